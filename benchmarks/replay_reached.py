"""Where a replayed search spends its compute, and what the best choice among its trials would be.

    python benchmarks/replay_reached.py                  # the default, 200 seeds, 8 trials at once
    python benchmarks/replay_reached.py --methods "one epoch, then top 3" --concurrency 1 8

For some amounts of compute (`replay.py` describes the replay): how many trials have come to each
milestone, the regret of what a search would pick, and that of the truly best of those that have
come so far, which no rule of choosing can beat. All regrets are medians.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.replay import REFERENCE_COMPUTE, SHOWN, be_quiet, load, search
from benchmarks.replay_clock import Trace
from benchmarks.replay_methods import METHODS
from benchmarks.replay_table import CurveTable

AMOUNTS = (REFERENCE_COMPUTE / 3, REFERENCE_COMPUTE, SHOWN[-1])
"""Full trainings: what a third of the reference's compute has bought, and what came after."""
DEFAULT = "tpe + asha"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8])
    parser.add_argument("--methods", nargs="+", default=[DEFAULT], choices=METHODS)
    arguments = parser.parse_args()
    be_quiet()
    table, _ = load()
    for concurrency in arguments.concurrency:
        for name in arguments.methods:
            print(f"\n{name}, {concurrency} trials at once, {arguments.seeds} seeds")
            traces = [search(name, concurrency, seed) for seed in range(arguments.seeds)]
            for amount in AMOUNTS:
                print(describe(table, traces, amount), flush=True)


def describe(table: CurveTable, traces: list[Trace], amount: float) -> str:
    """Return the lines of one amount of compute, in full trainings."""
    spent = amount * table.budget
    picks = [trace.picked(spent=spent) for trace in traces]
    usual = float(np.median([np.inf if row is None else table.regret(row) for row in picks]))
    lines = [f"after {amount:.1f} full trainings; what is picked: {usual:.4f}"]
    columns = sorted({report.column for trace in traces for report in trace.reports})
    for column in columns:
        rows = [reached(trace, column, spent) for trace in traces]
        best = [min((table.regret(row) for row in those), default=np.inf) for those in rows]
        share = table.seen[:, column].min() / table.budget
        lines.append(
            f"  trials at {share:4.2f} of the training: {np.mean([len(r) for r in rows]):5.1f}"
            f"   truly best of them: {float(np.median(best)):.4f}"
        )
    return "\n".join(lines)


def reached(trace: Trace, column: int, spent: float) -> list[int]:
    """Return the rows that had come to a column when so much was spent, one for each trial."""
    return [r.row for r in trace.reports if r.column == column and r.spent <= spent]


if __name__ == "__main__":
    main()
