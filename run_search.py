"""Search hyperparameters: run the trials of a space file and keep the best configuration."""

from nanovlm import process

if __name__ == "__main__":
    process.listen()  # before all that takes time to import

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nanovlm import cli
from nanovlm.config.sources import parse_overrides
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.files import user_path
from nanovlm.results.folder import search_folder
from nanovlm.watch.terminal.console import PLAIN, PreparationDisplay, make_console
from nanovlm.watch.terminal.search_display import SearchDisplay
from nanovlm.watch.terminal.tables import describe_data

if TYPE_CHECKING:
    from nanovlm.search.plan import SearchPlan
    from nanovlm.watch.observer import Observer

EXAMPLES = """look at a search while it runs, in Optuna's dashboard:
  python -m nanovlm dashboard results/NAME

examples:
  python run_search.py --space search_spaces/digits.yaml
  python run_search.py --space search_spaces/digits.yaml --dry-run
  python run_search.py --space search_spaces/digits.yaml --trials 40 --name long epochs=2
  python run_search.py --space search_spaces/digits.yaml --address auto resources.workers=2
  python run_search.py --space FILE --results /shared/results --submit http://HEAD:8265
  python run_search.py --space FILE --results s3://BUCKET/PATH

a study in a database, its password from the environment (docs/search.md):
  python run_search.py --space search_spaces/digits.yaml \\
      'study.storage=postgresql+psycopg://me:${NANOVLM_DB_PASSWORD}@host/nanovlm'
"""


def parse_arguments() -> argparse.Namespace:
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("--space", type=user_path, required=True, help="the space file (YAML)")
    parser.add_argument("--trials", type=cli.at_least_one, help="number of trials to run")
    parser.add_argument("--hours", type=cli.above_zero, help="end the search after so many hours")
    parser.add_argument(
        "--concurrency",
        type=cli.at_least_one,
        help="trials that run at the same time; default: what fits",
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
    if sys.argv[1:2] == ["dashboard"]:
        from nanovlm.__main__ import main as run_command

        return run_command(sys.argv[1:])
    arguments = parse_arguments()
    space = load_space(arguments.space, space_overrides(arguments), cli.layers_below(arguments))
    if arguments.submit:
        from nanovlm.commands.submit import submit_search

        return submit_search(arguments, space)
    with cli.local_results(arguments, space.name) as observers:
        return search(arguments, space, observers)


def search(
    arguments: argparse.Namespace, space: SearchSpace, observers: Sequence["Observer"]
) -> int:
    """Search the space, or only print what that would cost; return the exit code."""
    cli.settle_resume(arguments, space.name)
    folder = search_folder(arguments.results, arguments.name, space, arguments.resume)
    # Imported late: a mistake in the space file is reported before torch and Ray are loaded.
    from nanovlm.search.plan import plan_search

    console = make_console()
    with PreparationDisplay(console, arguments.quiet) as preparation:
        plan = plan_search(space, preparation.update)
    if arguments.dry_run:
        return dry_run(arguments, plan, console)
    from nanovlm.cluster.recorder import RunOutcome
    from nanovlm.search.run import run_plan

    def run() -> RunOutcome:
        with SearchDisplay(console, arguments.quiet) as display:
            return run_plan(
                plan,
                folder,
                default_name=space.name if arguments.name is None else None,
                resume=arguments.resume,
                address=arguments.address,
                concurrency=arguments.concurrency,
                observers=[display, *observers],
            )

    return cli.show_outcome(console, folder, run)


def dry_run(arguments: argparse.Namespace, plan: "SearchPlan", console: Console) -> int:
    """Print the resolved space and what its search would cost."""
    from nanovlm.search.forecast import Forecast

    cost = Forecast(plan, arguments.concurrency, arguments.samples_per_second, arguments.results)
    data = describe_data(plan.data)
    console.print(f"{cost.describe()}\n{data}\n\n{plan.space.to_yaml()}", **PLAIN)
    return cli.DONE


def space_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_overrides(arguments.overrides)
    if arguments.trials is not None:
        overrides["budget.trials"] = arguments.trials
    if arguments.hours is not None:
        overrides["budget.hours"] = arguments.hours
    if arguments.no_confirm:
        overrides["confirm.top"] = 0
    return overrides


if __name__ == "__main__":
    cli.run_program(main)
