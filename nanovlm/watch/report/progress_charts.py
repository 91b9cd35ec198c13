"""How the search came to what it has: best so far against compute, and the learning curves."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.statistics import interval_95
from nanovlm.watch.report.figure import (
    STATE_STYLES,
    Chart,
    Variant,
    compact,
    floor_of,
    log_axis,
    marker,
    metric_axis,
    metric_hover,
    points,
    value_of,
    with_breaks,
)
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import is_accuracy, run_name, spent_seconds

_LOG_RATIO = 20
"""Milestones that lie further apart than this are shown on a log scale."""


def best_so_far(search: SearchFolder) -> Chart:
    """Return the best full trial against the training that was spent until then."""
    ended = sorted((r for r in search.records if r.ended_at), key=lambda r: r.ended_at or 0.0)
    ended += sorted((r for r in search.confirmed if r.ended_at), key=lambda r: r.ended_at or 0.0)
    if not any(value_of(record, search.metric) is not None for record in ended):
        return Chart(name="best-so-far", empty="No trial has reported yet.")
    device, per_trial = search.devices
    unit, seconds = time_unit(sum(map(spent_seconds, ended)) * per_trial)
    views: Sequence[tuple[str, str, Callable[[TrialRecord], float]]] = (
        ("samples", "training samples of all trials", lambda record: record.samples_seen),
        (
            f"{device}-{unit}",
            f"{device}-{unit} of all trials",
            lambda record: spent_seconds(record) * per_trial / seconds,
        ),
    )
    return Chart(
        name="best-so-far",
        height=400,
        variants=[
            Variant(
                label=name,
                traces=_best_traces(search, ended, [*itertools.accumulate(map(cost, ended))]),
                layout={
                    "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
                    "yaxis": metric_axis(search.metric),
                },
            )
            for name, title, cost in views
        ],
    )


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time is easy to read, and its seconds."""
    if seconds < 7200:
        return "minutes", 60.0
    return "hours", 3600.0


def _best_traces(
    search: SearchFolder, ended: Sequence[TrialRecord], costs: Sequence[float]
) -> list[dict[str, Any]]:
    at = {record.trial_id: cost for record, cost in zip(ended, costs, strict=True)}
    values = {r.trial_id: v for r in ended if (v := value_of(r, search.metric)) is not None}
    line = _best_line(search, ended, at, values)
    traces = [*_band(line, costs[-1], search.metric), *_step_line(line, costs[-1], search.metric)]
    if search.default and search.default.trial_id in values:
        level = values[search.default.trial_id]
        traces.append(_level("default", level, costs[-1]))
    floor = floor_of([*values.values()])
    for state, records in _by_kind(ended).items():
        heights = [values.get(record.trial_id, floor) for record in records]
        hover = "<extra></extra>"
        traces.append(
            points(
                records,
                [at[record.trial_id] for record in records],
                heights,
                name=state,
                marker=marker(state),
                hovertemplate=f"%{{text}}{hover}",
            )
        )
    return traces


def _by_kind(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return the runs by state, those that confirm apart, in the order of the legend."""
    kinds: dict[str, list[TrialRecord]] = {
        "completed": [], "paused": [], "stopped": [], "failed": [], "confirming": []
    }  # fmt: skip
    for record in records:
        is_confirming = record.confirms and record.state == "completed"
        kinds["confirming" if is_confirming else record.state].append(record)
    return {kind: runs for kind, runs in kinds.items() if runs}


def _best_line(
    search: SearchFolder,
    ended: Sequence[TrialRecord],
    at: Mapping[str, float],
    values: Mapping[str, float],
) -> list[tuple[float, TrialRecord]]:
    """Return each full trial of the search that was better than all before, and its place."""
    sign = 1 if search.objective.mode == "max" else -1
    line: list[tuple[float, TrialRecord]] = []
    for record in ended:
        value = values.get(record.trial_id)
        if value is None or record.confirms or record.state != "completed":
            continue
        if not line or sign * value > sign * values[line[-1][1].trial_id]:
            line.append((at[record.trial_id], record))
    return line


def _step_line(
    line: Sequence[tuple[float, TrialRecord]], end: float, metric: str
) -> list[dict[str, Any]]:
    if not line:
        return []
    ends = [*line, (end, line[-1][1])]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [compact(x) for x, _ in ends],
            "y": [compact(record.metrics[metric]) for _, record in ends],
            "line": {"shape": "hv", "color": "var(--best)", "width": 3},
            "hoverinfo": "skip",
        }
    ]


def _band(
    line: Sequence[tuple[float, TrialRecord]], end: float, metric: str
) -> list[dict[str, Any]]:
    """Return the 95 % interval of the best so far as an area."""
    intervals = [interval_95(record.metrics, metric) for _, record in line]
    if not line or None in intervals:
        return []
    xs = [compact(x) for x, _ in line] + [compact(end)]
    sides = []
    for side in (0, 1):
        heights = [compact(interval[side]) for interval in intervals if interval]
        sides.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "95 % interval",
                "x": xs,
                "y": [*heights, heights[-1]],
                "line": {"shape": "hv", "width": 0, "color": "var(--best-band)"},
                "fill": "tonexty" if side else "none",
                "fillcolor": "var(--best-band)",
                "showlegend": bool(side),
                "hoverinfo": "skip",
            }
        )
    return sides


def _level(name: str, height: float, end: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [0, compact(end)],
        "y": [compact(height)] * 2,
        "line": {"color": STATE_STYLES["default"]["color"], "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }


# ---------------------------------------------------------------------- learning curves


def learning_curves(search: SearchFolder) -> Chart:
    """Return what each trial reached at each of its reports; a switch changes the metric."""
    wanted = dict.fromkeys((search.metric, "mmstar_accuracy", "val_loss", "train_loss"))
    variants = [
        Variant(label=metric, traces=traces, layout=_curves_layout(search, metric))
        for metric in wanted
        if (traces := _curve_traces(search, metric))
    ]
    return Chart(
        name="learning-curves",
        variants=variants,
        height=460,
        empty="No trial has reported yet.",
    )


def _curve_traces(search: SearchFolder, metric: str) -> list[dict[str, Any]]:
    runs = [r for r in search.runs if _curve(r, metric)]
    best = search.best_trial
    special = {id(r): kind for kind, r in (("default", search.default), ("best", best)) if r}
    traces = []
    for kind, records in _by_kind(runs).items():
        plain = [record for record in records if id(record) not in special]
        if plain:
            traces.append(_curve_trace(plain, metric, kind))
    if metric == search.metric:
        traces += _running_traces(search)
    for record in runs:
        if id(record) in special:
            kind = special[id(record)]
            name = f"{kind}, {run_name(record)}"
            traces.append(_curve_trace([record], metric, kind, name=name, width=3.0))
    traces += _end_marks(runs, metric)
    return traces


def _curve(record: TrialRecord, metric: str) -> list[tuple[float, float]]:
    """Return samples seen and the metric at each report."""
    return [
        (report.samples_seen, report.metrics[metric])
        for report in record.reports
        if metric in report.metrics
    ]


def _curve_trace(
    records: Sequence[TrialRecord],
    metric: str,
    kind: str,
    *,
    name: str | None = None,
    width: float = 1.25,
) -> dict[str, Any]:
    """Return the curves of several trials as one trace."""
    curves = [_curve(record, metric) for record in records]
    is_special = name is not None
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name or kind,
        "legendgroup": name or kind,
        "x": with_breaks([x for x, _ in curve] for curve in curves),
        "y": with_breaks([y for _, y in curve] for curve in curves),
        "customdata": [
            text
            for record, curve in zip(records, curves, strict=True)
            for text in [record.trial_id] * (len(curve) + 1)
        ],
        "line": {"color": STATE_STYLES[kind]["color"], "width": width},
        "opacity": 1 if is_special else 0.75,
        "marker": marker(kind, 11 if is_special else 6),
        "hovertemplate": f"at %{{x:,}} samples: {metric_hover(metric)}<br>%{{text}}<extra></extra>",
    }


def _end_marks(runs: Sequence[TrialRecord], metric: str) -> list[dict[str, Any]]:
    """Return a mark where a trial was stopped or failed after a report."""
    traces = []
    marks = {"stopped": ("line-ew-open", "stopped here"), "failed": ("x", "failed here")}
    for state, (symbol, name) in marks.items():
        records = [record for record in runs if record.state == state]
        ends = [_curve(record, metric)[-1] for record in records]
        if records:
            look = marker(state, 13 if state == "stopped" else 10, symbol=symbol)
            look["line"] = {"color": STATE_STYLES[state]["color"], "width": 2.5}
            traces.append(
                points(
                    records,
                    [x for x, _ in ends],
                    [y for _, y in ends],
                    name=name,
                    marker=look,
                    hoverinfo="skip",
                )
            )
    return traces


def _running_traces(search: SearchFolder) -> list[dict[str, Any]]:
    """Return the curves of trials that run, as far as they passed milestones."""
    known = {record.number for record in search.trials}
    curves: dict[int, list[tuple[float, float]]] = {}
    for verdict in search.verdicts:
        if verdict["number"] not in known:
            place = verdict["samples_seen"], verdict["value"]
            curves.setdefault(verdict["number"], []).append(place)
    if not curves or search.ended_by is not None:
        return []
    texts = [f"trial {number}, not ended" for number in curves]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "running",
            "x": with_breaks([x for x, _ in curve] for curve in curves.values()),
            "y": with_breaks([y for _, y in curve] for curve in curves.values()),
            "hovertext": [
                text
                for text, curve in zip(texts, curves.values(), strict=True)
                for _ in range(len(curve) + 1)
            ],
            "line": {"color": STATE_STYLES["running"]["color"], "width": 2, "dash": "dot"},
            "marker": {**STATE_STYLES["running"], "size": 9},
            "hovertemplate": f"at %{{x:,}} samples: {metric_hover(search.metric)}"
            "<br>%{hovertext}<extra></extra>",
        }
    ]


def _curves_layout(search: SearchFolder, metric: str) -> dict[str, Any]:
    places = [x for record in search.runs for x, _ in _curve(record, metric)] + search.milestones
    low, high = max(1, min(places, default=1)), max(places, default=1)
    is_log = high / low > _LOG_RATIO
    axis = log_axis(low, high) if is_log else {"range": [0, 1.04 * high], "tickformat": ",~r"}
    y_axis = metric_axis(metric)
    if not is_accuracy(metric):
        y_axis["rangemode"] = "normal"
    return {
        "xaxis": {**axis, "title": {"text": "samples seen by the trial"}},
        "yaxis": y_axis,
        "shapes": [
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": milestone,
                "x1": milestone,
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"color": "var(--milestone)", "width": 1.5, "dash": "dot"},
            }
            for milestone in search.milestones
        ],
        "annotations": [
            {
                "x": math.log10(milestone) if is_log else milestone,
                "xref": "x",
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "text": f"rung {number}",
                "showarrow": False,
                "font": {"size": 11, "color": "var(--muted)"},
            }
            for number, milestone in enumerate(search.milestones, 1)
        ],
    }
