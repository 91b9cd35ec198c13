"""Make the report of a results folder: one HTML file with charts and tables, report.html."""

import argparse
import sys

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import user_path
from nanovlm.watch.report.page import write_report

EXAMPLES = """examples:
  python -m nanovlm report results/digits
  python -m nanovlm report results/*
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        type=user_path,
        metavar="FOLDER",
        help="a results folder: results/NAME",
    )


def run(arguments: argparse.Namespace) -> int:
    for folder in arguments.folders:
        try:
            path = write_report(folder)
        except OSError as error:
            raise UserError(f"{folder}: the report cannot be written: {error}") from error
        sys.stdout.write(f"{path}\n")
    return cli.DONE
