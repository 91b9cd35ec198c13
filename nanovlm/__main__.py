"""What there is beside the two programs: python -m nanovlm COMMAND --help"""

from nanovlm import process

if __name__ == "__main__":
    process.listen()  # before all that takes time to import

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanovlm import cli

COMMANDS = {
    "generate": "answer a question about an image with a saved model",
    "push": "put a saved model on the hub",
    "report": "make the report of a results folder",
    "dashboard": "look at a search in Optuna's dashboard",
    "data": "list and delete prepared data",
    "schema": "print the JSON schema of space files",
}
"""Modules of `nanovlm.commands`, each with `add_arguments` and `run`."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm",
        description="Commands beside run_search.py and run_single.py.",
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
    return parser.parse_args(argv)


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
