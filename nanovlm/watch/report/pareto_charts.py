"""What a search with several objectives has found: the trade-offs, their front, and how it grew."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from nanovlm.config.metrics import COSTS
from nanovlm.config.search_settings import Objective
from nanovlm.messages import TrialRecord
from nanovlm.results.pareto import Choice, choose, hypervolumes, values_of
from nanovlm.watch.report.figure import (
    Chart,
    Variant,
    compact,
    log_axis,
    marker,
    metric_axis,
    metric_hover,
    points,
)
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.tables import (
    Cell,
    Table,
    make_table,
    number_cell,
    value_cell,
)
from nanovlm.watch.report.wording import metric_value

_LOG_RATIO = 3
"""Costs that span more than this factor are shown on a log scale."""

_EMPTY = "No trial has run its full budget yet."


def front_chart(search: SearchFolder) -> Chart:
    """Return all trials by two objectives, with the front of those of full length marked."""
    choice = choose(search.records, search.objective)
    pairs = itertools.combinations(range(len(search.objective.all)), 2)
    return Chart(
        name="front",
        variants=[_front_variant(search, choice, *pair) for pair in pairs] if choice else (),
        height=460,
        empty=_EMPTY,
    )


def hypervolume_chart(search: SearchFolder) -> Chart:
    """Return how much of what the front now encloses was there after each trial."""
    ended = sorted(search.records, key=lambda record: record.ended_at or 0.0)
    shares = hypervolumes(ended, search.objective)
    trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "hypervolume",
        "x": list(range(1, len(shares) + 1)),
        "y": [compact(share) for share in shares],
        "line": {"shape": "hv", "color": "var(--best)", "width": 3},
        "hovertemplate": "after %{x} trials: %{y:.3f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "trials that have ended"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "hypervolume"}, "rangemode": "tozero"},
        "showlegend": False,
    }
    is_empty = not any(shares)
    variants = [] if is_empty else [Variant(label="hypervolume", traces=[trace], layout=layout)]
    return Chart(name="hypervolume", variants=variants, height=280, empty=_EMPTY)


def front_table(search: SearchFolder) -> Table | None:
    """Return a row for each trial on the front, the best by the first objective first."""
    choice = choose(search.records, search.objective)
    if choice is None:
        return None
    keys = [parameter.key for parameter in search.parameters]
    metrics = [each.metric for each in search.objective.all]
    shown = [*choice.front, *([] if choice.record in choice.front else [choice.record])]
    rows = [_front_row(search.objective, record, record is choice.record, keys) for record in shown]
    return make_table(["trial", "", *metrics, *keys], rows)


def _front_row(
    objective: Objective, record: TrialRecord, is_chosen: bool, keys: Sequence[str]
) -> list[Cell]:
    values = values_of(objective, record) or ()
    return [
        number_cell(record.number),
        Cell("chosen" if is_chosen else "on the front"),
        *(
            number_cell(value, metric_value(value, each.metric))
            for each, value in zip(objective.all, values, strict=True)
        ),
        *(value_cell(record.parameters, key) for key in keys),
    ]


def _front_variant(search: SearchFolder, choice: Choice | None, up: int, across: int) -> Variant:
    """Return the trials by objective number `across`, to the right, and `up`."""
    assert choice is not None, "there is a front"
    objective = search.objective
    y, x = objective.all[up], objective.all[across]
    known = [(r, v) for r in search.trials if (v := values_of(objective, r)) is not None]
    places = {record.trial_id: (row[across], row[up]) for record, row in known}
    special = {id(choice.record), *(id(record) for record in choice.front)}
    groups: dict[str, list[TrialRecord]] = {
        state: [r for r, _ in known if r.state == state and id(r) not in special]
        for state in ("completed", "paused", "stopped", "failed")
    }
    hover = f"{metric_hover(y.metric)}, {metric_hover(x.metric, 'x')}<br>%{{text}}<extra></extra>"

    def trace(records: Sequence[TrialRecord], name: str, kind: str, size: float) -> dict[str, Any]:
        xs, ys = zip(*(places[record.trial_id] for record in records), strict=True)
        look = marker(kind, size)
        return points(records, xs, ys, name=name, marker=look, hovertemplate=hover)

    traces = [trace(records, state, state, 8) for state, records in groups.items() if records]
    traces += _front_line(choice, objective, up, across)
    others = [record for record in choice.front if record is not choice.record]
    if others:
        traces.append(trace(others, "on the front", "confirming", 11))
    traces.append(trace([choice.record], "chosen", "best", 15))
    axis = metric_axis(x.metric)
    xs = [place[0] for place in places.values()]
    if x.metric in COSTS and max(xs) > _LOG_RATIO * min(xs):
        axis |= log_axis(min(xs), max(xs))
    return Variant(
        label=f"{y.metric} against {x.metric}",
        traces=traces,
        layout={"xaxis": axis, "yaxis": metric_axis(y.metric)},
    )


def _front_line(choice: Choice, objective: Objective, up: int, across: int) -> list[dict[str, Any]]:
    """Return the edge of what the front dominates; with three objectives it is no line."""
    if len(objective.all) != 2:
        return []
    values = [values_of(objective, record) or (math.nan, math.nan) for record in choice.front]
    # From the worst by the first objective on: to the right or left, then to the better value.
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "x": [compact(row[across]) for row in reversed(values)],
            "y": [compact(row[up]) for row in reversed(values)],
            "line": {"shape": "hv", "color": "var(--best)", "width": 2},
            "hoverinfo": "skip",
        }
    ]
