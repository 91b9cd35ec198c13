"""What a new user waits for: the demo search, from the command to the result.

    python benchmarks/demo.py                                  # about 6 minutes
    python benchmarks/demo.py --space my_space.yaml

Runs `run_search.py` on the digits space in a process of its own and prints the seconds to the first
report and to the end, the best accuracy, and the turnaround between trials, all from the results
folder and the clock of this machine.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.messages import TrialRecord
from nanovlm.results.read import read_records

REPOSITORY = Path(__file__).parents[1]


def first_report_at(record: TrialRecord) -> float:
    """Return when the trial made its first report, in seconds since the epoch."""
    assert record.first_step_at is not None, f"{record.trial_id} has no report"
    report = record.reports[0]
    return record.first_step_at - report.first_step_seconds + report.seconds


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--space", type=Path, default=REPOSITORY / "search_spaces" / "digits.yaml")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, str(REPOSITORY / "run_search.py"), "--name", "demo"]
        started = time.time()
        subprocess.run(
            [*command, "--space", str(arguments.space), "--results", results], check=True
        )
        seconds = time.time() - started
        folder = Path(results, "demo")
        records = read_records(folder)
        summary = json.loads((folder / "summary.json").read_text())
    first = min(first_report_at(record) for record in records if record.reports) - started
    best, turnaround = summary["best"], summary["turnaround_seconds"]
    low, high = best["interval_95"]
    print(f"\nstart to first report: {first:.1f} s; to the end: {seconds:.0f} s")
    print(f"trials: {summary['trials']}")
    print(f"best accuracy: {best['metrics']['mmstar_accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    print(
        f"turnaround: median {turnaround['median']:.3f} s, p95 {turnaround['p95']:.3f} s, "
        f"max {turnaround['max']:.3f} s"
    )


if __name__ == "__main__":
    main()
