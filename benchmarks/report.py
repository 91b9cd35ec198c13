"""What the report of a large search takes: to make, on disk, and to open in Chromium.

    python benchmarks/report.py                     # 1,000 trials over six keys
    python benchmarks/report.py --trials 5000
    python benchmarks/report.py --folder results/digits

Loaded means that numbers and tables are there and the page answers; opened, that the first chart is
drawn too. All charts are drawn while the browser has nothing else to do. The browser runs already.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from playwright.sync_api import Browser

from benchmarks.command_line import parser_of
from nanovlm.watch.report.page import write_report
from tests.browser import DRAWN, MILLISECONDS, chromium
from tests.results.fake_records import make_results

IN_VIEW = ".plot .main-svg"
"""What the first chart that is drawn brings with it."""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder
        if folder is None:
            folder = make_results(Path(temporary) / "search", num_trials=arguments.trials)
        seconds = []
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            path = write_report(folder)
            seconds.append(time.perf_counter() - started)
        print(f"made in {describe(seconds)}, {path.stat().st_size / 1e6:.1f} MB")
        with chromium() as browser:
            times = [open_page(browser, path) for _ in range(arguments.repeats)]
    for place, what in enumerate(("loaded", "opened", "all charts drawn")):
        print(f"{what} in {describe([own[place] for own in times])}")


def open_page(browser: Browser, path: Path) -> tuple[float, float, float]:
    """Return the seconds until the page is loaded, its first chart is drawn, and all are."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(MILLISECONDS)
    page.goto("about:blank")
    started = time.perf_counter()
    page.goto(path.resolve().as_uri())
    loaded = time.perf_counter() - started
    page.wait_for_selector(IN_VIEW, state="attached")
    opened = time.perf_counter() - started
    page.wait_for_selector(DRAWN, state="attached")
    drawn = time.perf_counter() - started
    page.close()
    return loaded, opened, drawn


def describe(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds)
    return f"{middle:.2f} s (median; {min(seconds):.2f} to {max(seconds):.2f})"


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="a results folder, in place of made-up trials")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
