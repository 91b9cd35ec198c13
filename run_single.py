"""Train one configuration and evaluate it: the same trial that a search would run."""

from nanovlm import process

if __name__ == "__main__":
    process.listen()  # before all that takes time to import

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanovlm import cli
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import load_config, parse_overrides
from nanovlm.errors import UserError
from nanovlm.results.folder import check_kept, choose_folder, folder_exists
from nanovlm.results.read import FolderReader
from nanovlm.results.summary import check_best_config
from nanovlm.watch.observer import Observer
from nanovlm.watch.terminal.console import PLAIN, PreparationDisplay, make_console
from nanovlm.watch.terminal.single_display import SingleDisplay

DEFAULT_NAME = "single"

EXAMPLES = """examples:
  python run_single.py --preset digits
  python run_single.py --config results/digits/best.yaml
  python run_single.py --preset digits --workers 2 lr_mp=1e-3 epochs=2
  python run_single.py --preset digits --name long epochs=20
  python run_single.py --preset digits --name long epochs=20 --resume
"""


def parse_arguments() -> argparse.Namespace:
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config", type=cli.copied_file, help="a configuration (YAML), such as best.yaml"
    )
    parser.add_argument("--preset", help="a name or a file; --config goes over it")
    parser.add_argument(
        "--workers", type=cli.at_least_one, default=1, help="processes (GPUs) that share the batch"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    overrides = parse_overrides(arguments.overrides)
    if arguments.config is not None:
        check_best_config(arguments.config)
    below = cli.layers_below(arguments)
    config = load_config(arguments.config, arguments.preset, overrides, below)
    if arguments.submit:
        from nanovlm.commands.submit import submit_single

        return submit_single(arguments, config)
    with cli.local_results(arguments, DEFAULT_NAME) as observers:
        return train(arguments, config, observers)


def train(arguments: argparse.Namespace, config: TrainConfig, observers: Sequence[Observer]) -> int:
    """Train the configuration; return the exit code."""
    cli.settle_resume(arguments, DEFAULT_NAME)
    folder = results_folder(arguments)
    if arguments.resume_if_exists and arguments.resume and FolderReader(folder).ended()[0]:
        make_console().print(f"the run in {folder} is over", **PLAIN)
        return cli.DONE
    # Imported late: a mistake in the configuration is reported before torch and Ray are loaded.
    from nanovlm.cluster.recorder import RunOutcome
    from nanovlm.cluster.single_run import plan_single, run_single, trial_resources

    console = make_console()
    resources = trial_resources(config, arguments.workers)
    with PreparationDisplay(console, arguments.quiet) as preparation:
        plan = plan_single(config, preparation.update)

    def run() -> RunOutcome:
        with SingleDisplay(console, arguments.quiet) as display:
            return run_single(
                plan,
                folder,
                resources,
                default_name=DEFAULT_NAME if arguments.name is None else None,
                resume=arguments.resume,
                address=arguments.address,
                observers=[display, *observers],
            )

    return cli.show_outcome(console, folder, run)


def results_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder to make, or with --resume the existing one."""
    if not arguments.resume:
        return choose_folder(arguments.results, arguments.name, DEFAULT_NAME)
    check_kept(arguments.results)
    folder: Path = arguments.results / (arguments.name or DEFAULT_NAME)
    if not folder_exists(folder):
        raise UserError(f"--resume: {folder} does not exist; --name says where the run was")
    return folder


if __name__ == "__main__":
    cli.run_program(main)
