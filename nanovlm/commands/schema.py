"""The JSON schema of space files, by which editors complete and check them."""

import argparse
import sys

from nanovlm import cli
from nanovlm.config.space_schema import SCHEMA_FILE, schema_text

EXAMPLES = """examples:
  python -m nanovlm schema           # print it
  python -m nanovlm schema --write   # bring search_spaces/space.schema.json up to date
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help=f"to {SCHEMA_FILE.name}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.write:
        SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    else:
        sys.stdout.write(schema_text())
    return cli.DONE
