"""How the search came to its result: best so far against compute, and the learning curves."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.statistics import interval_95
from nanovlm.results.write import describe_run
from nanovlm.watch.report import style
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.style import Chart, Curve, Trace, trace

_LOG_RATIO = 20
"""Milestones that lie further apart than this are shown on a log scale."""


def best_so_far(search: SearchFolder) -> Chart:
    """Return the best full trial against the training that was spent until then."""
    name, metric = "best-so-far", search.metric
    ended = [
        record
        for runs in (search.records, search.confirmed)
        for record in sorted(runs, key=lambda record: record.ended_at or 0.0)
        if record.ended_at
    ]
    if not style.values_by_trial(ended, metric):
        return Chart(name=name, empty="No trial has reported yet.")
    device, per_trial = search.devices
    times = [style.spent_seconds(record) * per_trial for record in ended]
    unit, seconds = time_unit(sum(times))
    costs = {
        "samples": ("training samples", [float(record.samples_seen) for record in ended]),
        f"{device}-{unit}": (f"{device}-{unit}", [time / seconds for time in times]),
    }
    variants = [
        {
            "label": shown,
            "traces": _best_traces(search, ended, [*itertools.accumulate(each)]),
            "xaxis": style.axis(f"{title} of all trials", rangemode="tozero"),
            "yaxis": style.metric_axis(metric),
        }
        for shown, (title, each) in costs.items()
    ]
    return Chart(name=name, height=400, variants=variants)


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time is easy to read, and its seconds."""
    return ("minutes", 60.0) if seconds < 7200 else ("hours", 3600.0)


def _best_traces(
    search: SearchFolder, ended: Sequence[TrialRecord], costs: Sequence[float]
) -> list[Trace]:
    at = {record.trial_id: cost for record, cost in zip(ended, costs, strict=True)}
    values = style.values_by_trial(ended, search.metric)
    traces = []
    if best := _improvements(search, ended, values):
        x = [*(at[record.trial_id] for record in best), costs[-1]]
        steps = [*best, best[-1]]
        intervals = [interval_95(record.metrics, search.metric) for record in steps]
        for side, look in enumerate(("below", "above") if None not in intervals else ()):
            if edge := [ends[side] for ends in intervals if ends]:
                traces.append(trace(look, "best-band", x, edge, "95 % interval"))
        heights = [values[record.trial_id] for record in steps]
        traces.append(trace("steps", "best", x, heights, "best so far"))
    if search.default and search.default.trial_id in values:
        height = values[search.default.trial_id]
        traces.append(trace("level", "default", [0, costs[-1]], [height] * 2, "default"))
    floor = style.floor_of(values)
    for kind, records in style.by_kind(ended).items():
        trials = [record.trial_id for record in records]
        heights = [values.get(trial, floor) for trial in trials]
        traces.append(trace("points", kind, map(at.get, trials), heights, kind, trials))
    return traces


def _improvements(
    search: SearchFolder, ended: Sequence[TrialRecord], values: Mapping[str, float]
) -> list[TrialRecord]:
    """Return each full trial of the search that was better than all before."""
    sign = 1 if search.objective.mode == "max" else -1
    best, found = -math.inf, []
    for record in ended:
        is_full = record.state == "completed" and not record.confirms
        value = sign * values.get(record.trial_id, -sign * math.inf)
        if is_full and value > best:
            best = value
            found.append(record)
    return found


# ---------------------------------------------------------------------- learning curves


def learning_curves(search: SearchFolder) -> Chart:
    """Return what each trial reached at each of its reports; a switch changes the metric."""
    metrics = dict.fromkeys((search.metric, "mmstar_accuracy", "val_loss", "train_loss"))
    found = {metric: _curve_traces(search, metric) for metric in metrics}
    return Chart(
        name="learning-curves",
        variants=[
            {"label": metric, "traces": traces, **_curve_axes(search, metric)}
            for metric, traces in found.items()
            if traces
        ],
        height=460,
        empty="No trial has reported yet.",
    )


def _curve_traces(search: SearchFolder, metric: str) -> list[Trace]:
    """Return the curves of all trials of a kind as one trace, and those of the special ones."""
    curves = {r.trial_id: curve for r in search.runs if (curve := _curve(r, metric))}
    runs = [record for record in search.runs if record.trial_id in curves]
    special = {record.trial_id: kind for kind, record in search.special.items()}
    hover = f"at %{{x:,}} samples: {style.metric_hover(metric)}<br>%{{hovertext}}<extra></extra>"

    def drawn(look: str, kind: str, name: str, own: Mapping[str, Curve]) -> Trace:
        return trace(look, kind, name=name, **style.joined(own), hovertemplate=hover)

    traces = []
    for kind, records in style.by_kind(r for r in runs if r.trial_id not in special).items():
        plain = {record.trial_id: curves[record.trial_id] for record in records}
        traces.append(drawn("curves", kind, kind, plain))
    if metric == search.metric and search.running:
        running = {f"trial-{number:04d}": curve for number, curve in search.running.items()}
        traces.append(drawn("open", "running", "running", running))
    for record in runs:
        if kind := special.get(record.trial_id, ""):
            own = {record.trial_id: curves[record.trial_id]}
            traces.append(drawn("curve", kind, f"{kind}, {describe_run(record)}", own))
    for kind in ("stopped", "failed"):
        if ends := [curves[record.trial_id][-1] for record in runs if record.state == kind]:
            x, y = zip(*ends, strict=True)
            traces.append(trace(kind, kind, x, y, f"{kind} here"))
    return traces


def _curve(record: TrialRecord, metric: str) -> Curve:
    """Return samples seen and the metric at each report."""
    return [(r.samples_seen, r.metrics[metric]) for r in record.reports if metric in r.metrics]


def _curve_axes(search: SearchFolder, metric: str) -> dict[str, Any]:
    reached = [x for record in search.runs for x, _ in _curve(record, metric)] + search.milestones
    low, high = max(1, min(reached)), max(reached)
    ends: dict[str, Any] = {"range": [0, 1.04 * high], "tickformat": ",~r"}
    if high / low > _LOG_RATIO:
        ends = {"scale": {"kind": "log", "low": low, "high": high}}
    return {
        "xaxis": style.axis("samples seen by the trial", **ends),
        "yaxis": style.metric_axis(metric),
        "milestones": search.milestones,
    }
