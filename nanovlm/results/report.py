"""Make the report of a results folder: one HTML file with charts and tables, `report.html`.

python -m nanovlm.results.report results/digits
"""

from nanovlm import interrupts

if __name__ == "__main__":
    interrupts.listen()  # before all that takes time to import

import argparse
import sys

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import user_path
from nanovlm.results.report_page.page import write_report

EXAMPLES = """examples:
  python -m nanovlm.results.report results/digits
  python -m nanovlm.results.report results/*
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.results.report",
        description="Make the report of a results folder: one HTML file, report.html.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=user_path,
        metavar="FOLDER",
        help="a results folder: results/NAME",
    )
    return parser.parse_args()


def main() -> int:
    for folder in parse_arguments().folders:
        try:
            path = write_report(folder)
        except OSError as error:
            raise UserError(f"{folder}: the report cannot be written: {error}") from error
        sys.stdout.write(f"{path}\n")
    return cli.DONE


if __name__ == "__main__":
    cli.run_program(main)
