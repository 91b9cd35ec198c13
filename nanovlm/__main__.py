"""The commands beside the two programs: python -m nanovlm COMMAND --help"""

from nanovlm import process

if __name__ == "__main__":
    process.listen()  # before all that takes time to import

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanovlm import cli
from nanovlm.errors import UserError

EXAMPLES = """examples:
  python -m nanovlm report results/*
  python -m nanovlm schema --write   # bring search_spaces/space.schema.json up to date
"""

COMMANDS = {
    "generate": "answer a question about an image with a saved model",
    "push": "put a saved model on the hub",
    "dashboard": "look at a search in Optuna's dashboard",
    "data": "list and delete prepared data",
}
"""Modules of `nanovlm.commands`, each with `add_arguments` and `run`."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm",
        description="Commands beside run_search.py and run_single.py.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked_for = next((word for word in argv if not word.startswith("-")), None)
    for name, what in COMMANDS.items():
        if name != asked_for:
            commands.add_parser(name, help=what)
            continue
        module = importlib.import_module(f"nanovlm.commands.{name}")  # some take seconds
        chosen = commands.add_parser(
            name,
            help=what,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    report = commands.add_parser("report", help="make report.html of results folders")
    report.add_argument("folders", nargs="+", metavar="results/NAME")
    report.set_defaults(run=write_reports)
    schema = commands.add_parser("schema", help="print the JSON schema of space files")
    schema.add_argument("--write", action="store_true", help="to search_spaces/space.schema.json")
    schema.set_defaults(run=show_schema)
    return parser.parse_args(argv)


def write_reports(arguments: argparse.Namespace) -> int:
    from nanovlm.results.remote import FAILURES

    for place in arguments.folders:
        try:
            sys.stdout.write(f"{_write_report(place)}\n")
        except FAILURES as error:
            raise UserError(f"{place}: the report cannot be written: {error}") from error
    return cli.DONE


def _write_report(place: str) -> str:
    """Write the report of a results folder, which may be in a bucket; return where it is."""
    from nanovlm.results.read import BEST_MODEL_DIR, CHECKPOINTS_DIR
    from nanovlm.results.remote import is_uri, local_copy, open_remote
    from nanovlm.watch.report.page import write_report

    folder = local_copy("report", place, without=(BEST_MODEL_DIR, CHECKPOINTS_DIR))
    path = write_report(folder)
    if not is_uri(place):
        return str(path)
    remote = open_remote("report", place)
    remote.put(path.name, path)
    return remote.address(path.name)


def show_schema(arguments: argparse.Namespace) -> int:
    from nanovlm.config.space_schema import SCHEMA_FILE, schema_text

    if arguments.write:
        SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    else:
        sys.stdout.write(schema_text())
    return cli.DONE


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Args:
        argv: its name, then its arguments.
    """
    arguments = parse_arguments(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    cli.run_program(lambda: main(sys.argv[1:]))
