"""The last lines of a search: the best configuration, its gain, how to run it, where to look."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation_table import confirmation_table
from nanovlm.results.read import ANSWERS_DIR, BEST_CONFIG_FILE, REPORT_FILE
from nanovlm.results.store import describe_run
from nanovlm.results.summary import by_rules, describe_accuracy, final_best
from nanovlm.results.terminal.console import PLAIN
from nanovlm.results.terminal.tables import results_table
from nanovlm.results.verdict import describe_unconfirmed_gain
from nanovlm.search.sections import Objective


def show_results(
    console: Console,
    folder: Path,
    objective: Objective,
    records: Sequence[TrialRecord],
    confirmed: Sequence[TrialRecord],
    summary: Mapping[str, Any],
    left_behind: str = "",
) -> None:
    """Print what a search has come to.

    Args:
        records: of the ended trials.
        confirmed: of the ended runs that confirm.
        summary: the content of `summary.json`.
        left_behind: how many trials did not come to their end.
    """
    console.print(f"\nended: {summary['ended_by']}\n", **PLAIN)
    if records:
        console.print(results_table(records, objective))
    if left_behind:
        console.print(f"\n{left_behind}", **PLAIN)
    confirmation = summary["confirmation"]
    if confirmation is not None:
        console.print()
        console.print(confirmation_table(confirmation, objective))
        console.print(f"\n{confirmation['verdict']}", **PLAIN)
    if (pareto := summary.get("pareto")) and pareto["front"]:
        console.print(f"\nchosen: {pareto['reason']}", **PLAIN)
    best = final_best(records, objective, confirmed, confirmation)
    report = folder / REPORT_FILE
    if report.exists():
        console.print(f"\nreport: {report}", **PLAIN)
    if best is None:
        console.print("\nno trial ran its full budget, so there is no best.yaml")
        return
    score = describe_accuracy(best.metrics, objective.metric)
    line = f"best: {describe_run(best)}, {objective.metric} {score}"
    line += by_rules(best.config, objective.metric)
    gain = None
    if confirmation is None:
        gain = describe_unconfirmed_gain(best, records, objective, folder / ANSWERS_DIR)
    command = f"python run_single.py --config {shlex.quote(str(folder / BEST_CONFIG_FILE))}"
    console.print(f"\n{line}{(gain and f'; {gain}') or ''}; run it again:\n{command}", **PLAIN)
