"""What all charts have in common: plotly figures as plain data, in the colours of the page.

A colour is a variable of the style sheet. The page's script sets in what it stands for, so that
charts follow when light turns to dark. The text that a pointer shows is written once for each
trial: a point carries the trial's name, and the script looks its text up.
"""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import (
    count,
    duration,
    is_accuracy,
    run_name,
    scored,
    setting,
    spent_seconds,
)

STATE_STYLES: Mapping[str, Mapping[str, Any]] = {
    "completed": {"color": "var(--completed)", "symbol": "circle"},
    "paused": {"color": "var(--paused)", "symbol": "hourglass"},
    "stopped": {"color": "var(--stopped)", "symbol": "triangle-down"},
    "failed": {"color": "var(--failed)", "symbol": "x"},
    "running": {"color": "var(--running)", "symbol": "diamond-open"},
    "confirming": {"color": "var(--confirming)", "symbol": "diamond"},
    "default": {"color": "var(--default)", "symbol": "square"},
    "best": {"color": "var(--best)", "symbol": "star"},
}
"""A colour and a shape for everything that is told apart: never the colour alone."""

NUM_SHADES = 8
"""Steps of the scale of colours from the worst to the best, `--shade-0` to `--shade-7`."""

_WIDEST_LINE = 52
"""Characters of a line of hover text."""
_LONGEST_REASON = 260
"""Characters of a reason in a hover text; the table of trials has all of it."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the views of a chart that a switch changes between."""

    label: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, or why there is none."""

    name: str
    """Of its element in the page."""
    variants: Sequence[Variant] = ()
    height: int = 380
    """In pixels."""
    min_width: int = 0
    """In pixels; on a narrower screen the chart is scrolled."""
    empty: str = "Nothing to show yet."
    """What is said in its place if there are no variants."""
    notes: Sequence[str] = field(default=())
    """What has to be known to read it."""

    def as_data(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        return {
            "name": self.name,
            "variants": [
                {"label": v.label, "data": list(v.traces), "layout": dict(v.layout)}
                for v in self.variants
            ],
        }


def value_of(record: TrialRecord, metric: str) -> float | None:
    """Return the metric of a trial, None if it has none that is a number."""
    value = record.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def label(text: Any) -> str:
    """Return text that plotly shows as it is: it reads a few tags of HTML."""
    return html.escape(str(text), quote=False)


def metric_axis(metric: str) -> dict[str, Any]:
    """Return the axis of a metric: accuracies in percent."""
    form = ".0%" if is_accuracy(metric) else "~g"
    return {"title": {"text": label(metric)}, "tickformat": form}


def metric_hover(metric: str, axis: str = "y") -> str:
    """Return the line of hover text that gives the value at a point."""
    form = ".1%" if is_accuracy(metric) else ".4g"
    return f"{label(metric)} %{{{axis}:{form}}}"


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Return a logarithmic axis over positive values, with ticks that people read."""
    pad = 0.04 * (math.log10(high) - math.log10(low) or 1)
    ticks = log_ticks(low, high)
    return {
        "type": "log",
        "range": [math.log10(low) - pad, math.log10(high) + pad],
        "tickvals": ticks,
        "ticktext": [tick_text(tick) for tick in ticks],
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten in the range; with few of them also their double and fivefold."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if math.log10(high / low) >= 2 else (1, 2, 5)
    ticks = [float(f"{f}e{power}") for power in range(first, last + 1) for f in factors]
    within = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return within if len(within) > 1 else [low, high]


def tick_text(value: float) -> str:
    """Return `1e-4`, `0.01`, `3,000`."""
    if value and abs(value) < 0.01:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def compact(value: float) -> float:
    """Return the value in six digits, all that a chart can show."""
    return float(f"{value:.6g}")


def points(
    records: Iterable[TrialRecord], x: Iterable[float], y: Iterable[float], **more: Any
) -> dict[str, Any]:
    """Return a trace of points, each of a trial, whose text the page looks up by its name."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [compact(value) for value in x],
        "y": [compact(value) for value in y],
        "customdata": [record.trial_id for record in records],
        **more,
    }


def marker(state: str, size: float = 9, **more: Any) -> dict[str, Any]:
    """Return the marker of what is told apart, with a rim in the colour of the background."""
    rim = {"color": "var(--card)", "width": 1}
    return {**STATE_STYLES[state], "size": size, "line": rim, **more}


def with_breaks(lines: Iterable[Sequence[float]]) -> list[float | None]:
    """Return the coordinates of many lines in one trace, an empty place after each."""
    joined: list[float | None] = []
    for line in lines:
        joined += [*map(compact, line), None]
    return joined


def floor_of(values: Sequence[float]) -> float:
    """Return the height below all values at which trials without one are shown."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return low - 0.08 * ((high - low) or abs(high) or 1.0)


def hover_texts(search: SearchFolder) -> dict[str, str]:
    """Return by trial what is shown where the pointer is."""
    return {record.trial_id: _hover_text(record, search.metric) for record in search.runs}


def _hover_text(record: TrialRecord, metric: str) -> str:
    lines = [f"<b>{label(run_name(record))}</b>, {record.state}"]
    if value_of(record, metric) is not None:
        lines.append(f"{label(metric)} {scored(record, metric)}")
    lines += [f"{label(key)} {label(setting(v))}" for key, v in record.parameters.items()]
    lines.append(f"{count(record.samples_seen)} samples, {duration(spent_seconds(record))}")
    if record.reason:
        reason = textwrap.shorten(record.reason, _LONGEST_REASON, placeholder=" ...")
        lines += [label(line) for line in textwrap.wrap(reason, _WIDEST_LINE)]
    return "<br>".join(lines)
