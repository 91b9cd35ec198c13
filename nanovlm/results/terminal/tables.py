"""The trials of a search as a table."""

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from nanovlm.messages import TrialRecord
from nanovlm.results.summary import by_rules, describe_accuracy
from nanovlm.results.terminal.texts import format_value
from nanovlm.results.tradeoff import values_of
from nanovlm.search.sections import Objective

MAX_ROWS = 20
"""Trials in the final table."""

COLORS = {
    "completed": "green", "paused": "cyan", "stopped": "yellow", "failed": "red", "running": "blue",
}  # fmt: skip
"""Of a trial's state."""


def results_table(records: Sequence[TrialRecord], objective: Objective) -> Table:
    """Return the trials as a table, the best first; a shorter trial never before a full one."""
    sign = -1 if objective.mode == "max" else 1
    order = {"completed": 0, "stopped": 1, "failed": 2}

    def rank(record: TrialRecord) -> tuple[int, int, float]:
        value = record.metrics.get(objective.metric, math.inf)
        length = 0 if record.state == "completed" else record.samples_seen
        return order[record.state], -length, sign * value

    shown = sorted(records, key=rank)[:MAX_ROWS]
    metric = objective.metric + (by_rules(records[0].config, objective.metric) if records else "")
    keys = sorted({key for record in records for key in record.parameters})
    table = Table(title_justify="left", header_style="bold", box=None, pad_edge=False)
    others = objective.all[1:]
    for name in ("trial", "state", "samples", metric, *(o.metric for o in others), *keys):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for record in shown:
        values = values_of(objective, record) or (math.nan,) * len(objective.all)
        has_score = objective.metric in record.metrics
        table.add_row(
            str(record.number),
            f"[{COLORS[record.state]}]{record.state}[/]",
            str(record.samples_seen),
            escape(describe_accuracy(record.metrics, objective.metric) if has_score else "-"),
            *("-" if math.isnan(value) else f"{value:.4g}" for value in values[1:]),
            *(escape(format_value(record.parameters.get(key, "-"))) for key in keys),
        )
    return table
