"""Search hyperparameters: run the trials of a space file and keep the best configuration."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nanovlm import cli
from nanovlm.config_files import parse_overrides
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation_table import confirmation_table
from nanovlm.results.store import (
    BEST_CONFIG_FILE,
    DATA_FILE,
    SPACE_FILE,
    ResultsStore,
    choose_folder,
    describe_run,
)
from nanovlm.results.summary import Objective, describe_accuracy
from nanovlm.results.terminal import (
    PreparationDisplay,
    SearchDisplay,
    describe_data,
    make_console,
    results_table,
)
from nanovlm.search.confirm_plan import plan_confirmation
from nanovlm.search.space import SearchSpace, load_space

if TYPE_CHECKING:
    from nanovlm.search.plan import SearchPlan

INTERRUPTED = "interrupted"

EXAMPLES = """examples:
  python run_search.py --space search_spaces/digits.yaml
  python run_search.py --space search_spaces/digits.yaml --trials 40 --name long epochs=2
  python run_search.py --space search_spaces/digits.yaml --address auto resources.workers=2
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--space", type=Path, required=True, help="the space file (YAML)")
    cli.add_common_arguments(parser)
    parser.add_argument("--trials", type=cli.at_least_one, help="number of trials to run")
    parser.add_argument("--hours", type=cli.above_zero, help="end the search after so many hours")
    parser.add_argument(
        "--concurrency", type=cli.at_least_one, help="trials at once; default: what fits"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the interrupted search in the folder"
    )
    parser.add_argument(
        "--no-confirm", action="store_true", help="run no configuration again after the search"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the search would cost, and end"
    )
    parser.add_argument(
        "--samples-per-second",
        type=cli.above_zero,
        help="speed of one trial for --dry-run; default: as measured in earlier searches",
    )
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    space = load_space(arguments.space, space_overrides(arguments), cli.start_layers)
    folder = results_folder(arguments, space)
    # Imported late: a mistake in the space file is told at once, and not after torch and Ray.
    from nanovlm.search.forecast import forecast
    from nanovlm.search.plan import plan_search

    console = make_console()
    with PreparationDisplay(console) as preparation:
        plan = plan_search(space, preparation.update)
    if arguments.dry_run:
        rate = arguments.samples_per_second
        cost = forecast(plan, arguments.concurrency, rate, arguments.results)
        console.print(f"{cost.describe()}\n\n{space.to_yaml()}", **cli.PLAIN)
        return cli.DONE
    if arguments.resume:
        check_same_data(folder, plan.data)
    check_room(plan, arguments.concurrency, folder)
    objective = Objective(**space.objective.model_dump())
    resources, num_models = space.resources, max(1, space.confirm.top)
    store = ResultsStore(folder, objective, resources.gpus_per_trial, num_models)
    with store.opened(resume=arguments.resume):
        ended_by = search(arguments, space, plan, store, console)
    show_results(console, store, ended_by)
    for note in plan_confirmation(plan.space, store.records).notes:
        console.print(f"note: {note}", style="yellow", **cli.PLAIN)
    if ended_by == INTERRUPTED:
        console.print(f"\nto go on:\n{resume_command(folder)}", **cli.PLAIN)
        return cli.INTERRUPTED
    failed = [record.state == "failed" for record in store.records]
    return cli.FAILED if failed and all(failed) else cli.DONE


def search(
    arguments: argparse.Namespace,
    space: SearchSpace,
    plan: "SearchPlan",
    store: ResultsStore,
    console: Console,
) -> str:
    """Run the search in the opened results folder; return why it ended."""
    from nanovlm.search.runner import EarlierRun, Place, run_search

    earlier = EarlierRun(tuple(store.records), tuple(store.confirmed), store.earlier_seconds())
    started = time.monotonic() - earlier.seconds

    def on_start(dashboard_url: str | None, is_own: bool, num_slots: int) -> None:
        if store.has_begun:
            return  # for the runs that confirm
        store.begin()
        store.write_text(SPACE_FILE, space.to_yaml())
        store.write_json(DATA_FILE, plan.data)
        cluster = cli.describe_cluster(dashboard_url, is_own)
        about = f"{plan.describe()}\n{num_slots} at once; results: {store.folder}"
        console.print(f"{cluster}\n{about}\n{describe_data(plan.data)}", **cli.PLAIN)

    def on_record(record: TrialRecord) -> None:
        if record.state != "running":
            store.add(record)
        store.write_summary(time.monotonic() - started)
        display.update(record)

    def on_confirmed(record: TrialRecord) -> None:
        if record.state != "running":
            store.add_confirmed(record)
        store.write_summary(time.monotonic() - started)
        display.update_confirmed(record)

    with SearchDisplay(console, store.objective, space.budget.trials, store.records) as display:
        place = Place(
            store.folder,
            on_start,
            on_record,
            on_confirmed,
            address=arguments.address,
            concurrency=arguments.concurrency,
        )
        try:
            ended_by = run_search(plan, place, earlier)
        except KeyboardInterrupt:  # while Ray starts, or for the second time
            if not store.has_begun:
                raise
            ended_by = INTERRUPTED
    if ended_by != INTERRUPTED:
        store.settle_confirmed()
    store.close(time.monotonic() - started, ended_by)
    return ended_by


def check_room(plan: "SearchPlan", concurrency: int | None, folder: Path) -> None:
    """Raise UserError if the disk has not the room that the search may take."""
    from nanovlm.search.disk import check_disk, disk_peak
    from nanovlm.search.forecast import UNKNOWN_TRIALS, local_slots

    peak = disk_peak(
        plan.space,
        num_trials=plan.space.budget.trials or UNKNOWN_TRIALS,
        concurrency=concurrency or local_slots(plan.space.resources),
        num_questions=plan.data["benchmark"]["samples"],
    )
    check_disk(peak, folder)


def results_folder(arguments: argparse.Namespace, space: SearchSpace) -> Path:
    """Return the folder to make, or with --resume the one to go on with."""
    if not arguments.resume:
        return choose_folder(arguments.results, arguments.name, space.name)
    folder = arguments.results / (arguments.name or space.name)
    if not (folder / SPACE_FILE).exists():
        raise UserError(f"--resume: {folder} holds no search to go on with (no {SPACE_FILE})")
    differing = space.differences(load_space(folder / SPACE_FILE))
    if differing:
        raise UserError(
            f"--resume: the search in {folder} is of another space; it differs in "
            f"{', '.join(differing)}; only the budget may change"
        )
    return folder


def check_same_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Raise UserError if a search would go on with other data than it has begun with."""
    path = folder / DATA_FILE
    if not path.exists():
        return
    before = json.loads(path.read_text())
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    keys = {part: (before[part]["folder"], data[part]["folder"]) for part in data}
    differing = [part for part, (old, new) in keys.items() if Path(old).name != Path(new).name]
    if differing:
        raise UserError(
            f"--resume: the data for {' and '.join(differing)} is not that of {path}: trials on "
            "both could not be compared. Of a data set on the hub ID@COMMIT names a version; the "
            "files of a folder must have the sizes and times that they had"
        )


def resume_command(folder: Path) -> str:
    """Return this program's command line with --resume and the name of the folder."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if not any(word == "--name" or word.startswith("--name=") for word in words):
        words += ["--name", folder.name]
    return shlex.join(["python", "run_search.py", *words, "--resume"])


def space_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_overrides(arguments.overrides)
    if arguments.trials is not None:
        overrides["budget.trials"] = arguments.trials
    if arguments.hours is not None:
        overrides["budget.hours"] = arguments.hours
    if arguments.no_confirm:
        overrides["confirm.top"] = 0
    return overrides


def show_results(console: Console, store: ResultsStore, ended_by: str) -> None:
    console.print(f"\nended: {ended_by}\n", **cli.PLAIN)
    if store.records:
        console.print(results_table(store.records, store.objective))
    confirmation = store.confirmation()
    if confirmation is not None:
        console.print()
        console.print(confirmation_table(confirmation, store.objective))
        console.print(f"\n{confirmation['verdict']}", **cli.PLAIN)
    best = store.best
    if best is None:
        console.print("\nno trial ran its full budget, so there is no best.yaml")
        return
    score = describe_accuracy(best.metrics, store.objective.metric)
    command = f"python run_single.py --config {shlex.quote(str(store.folder / BEST_CONFIG_FILE))}"
    console.print(
        f"\nbest: {describe_run(best)}, {store.objective.metric} {score}; run it again:\n{command}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    cli.run_program(main)
