"""Train one configuration and evaluate it: the same trial that a search would run."""

import argparse
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from nanovlm import cli
from nanovlm.config_files import load_config, parse_overrides
from nanovlm.messages import Job, TrialRecord
from nanovlm.results.kept_models import model_dir
from nanovlm.results.store import DATA_FILE, ResultsStore, answers_file, choose_folder
from nanovlm.results.summary import Objective, describe_accuracy
from nanovlm.results.terminal import (
    NotesDisplay,
    PreparationDisplay,
    describe_data,
    describe_speed,
    make_console,
)

EXAMPLES = """examples:
  python run_single.py --preset digits
  python run_single.py --config results/digits/best.yaml
  python run_single.py --preset digits --workers 2 lr_mp=1e-3 epochs=2
"""

TRIAL_ID = "trial-0000"
OBJECTIVE = Objective("mmstar_accuracy", "max")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a configuration (YAML), such as best.yaml")
    parser.add_argument("--preset", help="a name in presets/ or a file; --config goes over it")
    cli.add_common_arguments(parser)
    parser.add_argument(
        "--workers", type=cli.at_least_one, default=1, help="processes (GPUs) that share the batch"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    overrides = parse_overrides(arguments.overrides)
    config = load_config(arguments.config, arguments.preset, overrides, cli.start_layers)
    folder = choose_folder(arguments.results, arguments.name, "single")
    # Imported late: a mistake in the configuration is told at once, and not after torch and Ray.
    from nanovlm.distributed.single import plan_single, run_single, trial_resources

    console = make_console()
    resources = trial_resources(config, arguments.workers)
    with PreparationDisplay(console) as preparation:
        plan = plan_single(config, preparation.update)
    job = Job(
        trial_id=TRIAL_ID,
        config=plan.config,
        milestones=plan.milestones,
        output_dir=str(model_dir(folder.resolve(), TRIAL_ID)),
        answers_file=str(answers_file(folder.resolve(), TRIAL_ID)),
    )
    store = ResultsStore(folder, OBJECTIVE, resources.gpus_per_trial)
    notes = NotesDisplay(console)
    started = time.monotonic()

    def on_start(dashboard_url: str | None, is_own: bool, num_slots: int) -> None:
        cluster = cli.describe_cluster(dashboard_url, is_own)
        console.print(f"{cluster}\nresults: {folder}\n{describe_data(plan.data)}", **cli.PLAIN)

    def on_record(record: TrialRecord) -> None:
        notes.update(record)
        show_progress(console, record)
        if record.state != "running":
            store.begin()
            store.write_json(DATA_FILE, plan.data)
            store.add(record)

    with store.opened(resume=False):
        run_single(
            job,
            resources,
            folder,
            address=arguments.address,
            on_start=on_start,
            on_record=on_record,
        )
        if not store.records:
            command = shlex.join(["python", *sys.argv])
            console.print(f"\ninterrupted; to begin again:\n{command}", **cli.PLAIN)
            return cli.INTERRUPTED
        store.close(time.monotonic() - started, store.records[-1].reason or "completed")
    return cli.DONE if store.records[-1].state == "completed" else cli.FAILED


def show_progress(console: Console, record: TrialRecord) -> None:
    if record.reports:
        report, speed = record.reports[-1], describe_speed(record)
        console.print(
            f"{report['samples_seen']} samples, step {report['step']}: "
            f"train_loss {report['metrics']['train_loss']:.4f}, mmstar_accuracy "
            f"{describe_accuracy(report['metrics'], 'mmstar_accuracy')}  "
            f"({report['seconds']:.1f} s{speed and f', {speed}'})",
            highlight=False,
            markup=False,
        )
    if record.state == "failed":
        console.print(f"failed: {record.reason}", style="red", highlight=False, markup=False)


if __name__ == "__main__":
    cli.run_program(main)
