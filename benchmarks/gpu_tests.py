"""The tests that need a GPU, and what became of each.

    python benchmarks/gpu_tests.py --json figures.json

Runs pytest on the files that have such tests and writes the figures after every test, so that a
run that is cut off leaves what it found. Without a GPU all of them are skipped.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import pytest

from benchmarks.command_line import parser_of
from benchmarks.figures import Figures

REPOSITORY = Path(__file__).parents[1]
MARK = "mark.gpu"
NUM_LINES = 30
"""Of what pytest says about a failure."""


class Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._counts = Counter(passed=0, failed=0, skipped=0)
        self._seconds: dict[str, float] = {}
        self._failures: dict[str, list[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._figures.add(collected=len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            self._seconds[report.nodeid] = report.duration
        if report.failed:
            self._failures[report.nodeid] = report.longreprtext.splitlines()[-NUM_LINES:]
        self._figures.add(**self._counts, seconds=self._seconds, failures=self._failures)

    @property
    def num_passed(self) -> int:
        return self._counts["passed"]


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tests", type=Path, default=REPOSITORY / "tests", help="their folder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def files_with_gpu_tests(folder: Path) -> list[str]:
    """Return the test files that have such tests; others may need packages that are not there."""
    return sorted(str(p) for p in folder.rglob("test_*.py") if MARK in p.read_text("utf-8"))


def main() -> int:
    arguments = parse_arguments()
    outcomes = Outcomes(Figures(arguments.json))
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--durations=5"]
    code = pytest.main([*options, *files_with_gpu_tests(arguments.tests)], plugins=[outcomes])
    if code == 0 and arguments.device == "cuda" and not outcomes.num_passed:
        print("no test has passed: is there a GPU?")
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
