"""Where in the space the good trials lie: parallel coordinates, and a slice for each key."""

from collections.abc import Sequence
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.watch.report.figure import (
    NUM_SHADES,
    STATE_STYLES,
    Chart,
    Variant,
    compact,
    floor_of,
    label,
    marker,
    metric_axis,
    points,
    value_of,
)
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.scales import Scale, scales
from nanovlm.watch.report.wording import metric_value, run_name

_NOT_USED = -0.1
"""Height on an axis of a key that has no value in a trial, by its condition."""
_MANY = 150
"""With more trials lines and dots are drawn thin."""
_AXIS_WIDTH = 104
"""In pixels, at least; with more axes the chart is scrolled."""


def parallel_coordinates(search: SearchFolder) -> Chart:
    """Return a line for each trial over an axis for each searched key and one for the objective."""
    judged = [r for r in search.trials if value_of(r, search.metric) is not None]
    if not search.parameters:
        return Chart(name="parallel", empty="No key was searched.")
    if len(judged) < 2:
        return Chart(name="parallel", empty="Needs two trials that have reported.")
    axes = scales(search.parameters)
    low, high = _range(search, judged)
    heights = {r.trial_id: _heights(r, axes, search, low, high) for r in judged}
    shades: dict[tuple[int, bool], list[TrialRecord]] = {}
    for record in judged:
        shade = min(NUM_SHADES - 1, int(NUM_SHADES * heights[record.trial_id][-1]))
        shades.setdefault((shade, record.state == "completed"), []).append(record)
    thin = 0.5 if len(judged) > _MANY else 1.0
    traces = [
        _lines(records, heights, shade, is_full, thin)
        for (shade, is_full), records in sorted(shades.items(), key=lambda item: item[0])
    ]
    for kind, special in (("default", search.default), ("best", search.best_trial)):
        if special is not None and special.trial_id in heights:
            traces.append(_special_line(special, heights, kind))
    traces.append(_dots(judged, heights, 6 * thin))
    traces.append(_pointed())
    return Chart(
        name="parallel",
        variants=[Variant(label="", traces=traces, layout=_layout(search, axes, low, high))],
        height=460,
        min_width=_AXIS_WIDTH * (len(axes) + 1),
    )


def _range(search: SearchFolder, judged: Sequence[TrialRecord]) -> tuple[float, float]:
    """Return the worst and the best value."""
    values = [record.metrics[search.metric] for record in judged]
    low, high = min(values), max(values)
    return (low, high) if search.objective.mode == "max" else (high, low)


def _heights(
    record: TrialRecord, axes: Sequence[Scale], search: SearchFolder, low: float, high: float
) -> list[float]:
    places = [scale.height(record) for scale in axes]
    value = record.metrics[search.metric]
    score = (value - low) / (high - low) if high != low else 0.5
    return [compact(_NOT_USED if place is None else place) for place in (*places, score)]


def _lines(
    records: Sequence[TrialRecord],
    heights: dict[str, list[float]],
    shade: int,
    is_full: bool,
    thin: float,
) -> dict[str, Any]:
    """Return the lines of trials that are about as good, as one trace."""
    xs: list[int | None] = []
    ys: list[float | None] = []
    for record in records:
        own = heights[record.trial_id]
        xs += [*range(len(own)), None]
        ys += [*own, None]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": {
            "color": f"var(--shade-{shade})",
            "width": thin * (1.8 if is_full else 1.2),
            "dash": "solid" if is_full else "dot",
        },
        "opacity": 0.9 if is_full else 0.75,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _special_line(
    record: TrialRecord, heights: dict[str, list[float]], kind: str
) -> dict[str, Any]:
    own = heights[record.trial_id]
    dash = "dash" if kind == "default" else "solid"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{kind}, {run_name(record)}",
        "x": list(range(len(own))),
        "y": own,
        "line": {"color": STATE_STYLES[kind]["color"], "width": 3, "dash": dash},
        "marker": marker(kind, 11),
        "hoverinfo": "skip",
    }


def _dots(
    judged: Sequence[TrialRecord], heights: dict[str, list[float]], size: float
) -> dict[str, Any]:
    """Return what the pointer finds: a small dot where a line crosses an axis."""
    places = [(r, x, y) for r in judged for x, y in enumerate(heights[r.trial_id])]
    return points(
        [record for record, _, _ in places],
        [x for _, x, _ in places],
        [y for _, _, y in places],
        name="trials",
        marker={"size": size, "color": "var(--ink)", "opacity": 0.28},
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )


def _pointed() -> dict[str, Any]:
    """Return the line of the trial under the pointer; the page's script fills it in."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "pointed at",
        "x": [None],
        "y": [None],
        "line": {"color": "var(--accent)", "width": 3.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _layout(
    search: SearchFolder, axes: Sequence[Scale], worst: float, best: float
) -> dict[str, Any]:
    last = len(axes)
    names = [*(scale.key for scale in axes), search.metric]
    lowest = _NOT_USED if any(scale.parameter.when for scale in axes) else 0.0
    ticks = [(x, height, text) for x, scale in enumerate(axes) for height, text in scale.ticks()]
    ticks += [(x, _NOT_USED, "not used") for x, scale in enumerate(axes) if scale.parameter.when]
    ticks += [
        (last, k / 4, metric_value(worst + k / 4 * (best - worst), search.metric)) for k in range(5)
    ]
    return {
        "xaxis": {
            "range": [-0.45, last + 0.35],
            "tickvals": list(range(last + 1)),
            "ticktext": [f"<b>{label(name)}</b>" for name in names],
            "side": "top",
            "showgrid": False,
            "zeroline": False,
            "tickangle": 0,
            "fixedrange": True,
        },
        "yaxis": {"range": [lowest - 0.05, 1.06], "visible": False, "fixedrange": True},
        "legend": {"y": -0.02, "yanchor": "top"},
        "shapes": [
            {
                "type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1,
                "line": {"color": "var(--axis)", "width": 1.5}, "layer": "below",
            }
            for x in range(last + 1)
        ],
        "annotations": [
            {
                "x": x, "y": height, "text": text, "showarrow": False,
                "xanchor": "right", "xshift": -9, "bgcolor": "var(--card-veil)", "borderpad": 1,
                "font": {"size": 11, "color": "var(--muted)"},
            }
            for x, height, text in ticks
        ],
        "hovermode": "closest",
    }  # fmt: skip


def slices(search: SearchFolder) -> list[Chart]:
    """Return for each searched key the objective of all trials against its value."""
    values = [v for r in search.trials if (v := value_of(r, search.metric)) is not None]
    return [
        Chart(
            name=f"slice-{number}",
            variants=[_slice(search, scale, floor_of(values))] if values else (),
            height=300,
            empty=f"{scale.key}: no trial has reported yet.",
        )
        for number, scale in enumerate(scales(search.parameters))
    ]


def _slice(search: SearchFolder, scale: Scale, floor: float) -> Variant:
    special = {"default": search.default, "best": search.best_trial}
    kinds: dict[str, list[TrialRecord]] = {
        state: [
            record
            for record in search.trials
            if record.state == state and record not in special.values()
        ]
        for state in ("completed", "paused", "stopped", "failed")
    }
    kinds |= {kind: [record] for kind, record in special.items() if record is not None}
    traces = []
    for kind, records in kinds.items():
        shown = [record for record in records if scale.place(record) is not None]
        if shown:
            traces.append(_slice_points(search, scale, kind, shown, floor))
    return Variant(
        label=scale.key,
        traces=traces,
        layout={
            "xaxis": dict(scale.axis()),
            "yaxis": metric_axis(search.metric),
            "showlegend": False,
            "margin": {"t": 12},
        },
    )


def _slice_points(
    search: SearchFolder, scale: Scale, kind: str, records: Sequence[TrialRecord], floor: float
) -> dict[str, Any]:
    values = [value_of(record, search.metric) for record in records]
    is_special = kind in ("default", "best")
    return points(
        records,
        [scale.spread(record) or 0.0 for record in records],
        [floor if value is None else value for value in values],
        name=kind,
        marker=marker(kind, 13 if is_special else 9),
        opacity=1 if is_special else 0.85,
        hovertemplate="%{hovertext}<extra></extra>",
    )
