"""How the report writes numbers, and what its charts have in common.

A chart is data: traces, each with a look and a kind, and axes. `assets/charts.js` makes plotly's
figures of it, in the colours of the page. The text that a pointer shows is written once for each
trial: a point carries the trial's id, and the script looks its text up.
"""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.statistics import interval_95
from nanovlm.results.write import describe_run
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.terminal.tables import format_value

NOTHING = "–"  # noqa: RUF001 - a dash for an empty cell


def is_accuracy(metric: str) -> bool:
    return "accuracy" in metric


def metric_value(value: float | None, metric: str) -> str:
    """Return `96.6 %` for an accuracy, else the value in four digits."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if is_accuracy(metric) else f"{value:.4g}"


def metric_interval(interval: Sequence[float], metric: str) -> str:
    """Return `95.4 to 97.5 %`."""
    if is_accuracy(metric):
        return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def difference(value: float, metric: str) -> str:
    """Return `+16.2 points` for accuracies, else the signed difference."""
    return _signed(value, metric) + (" points" if is_accuracy(metric) else "")


def difference_interval(interval: Sequence[float], metric: str) -> str:
    """Return `+14.1 to +18.3`."""
    return " to ".join(_signed(end, metric) for end in interval)


def _signed(value: float, metric: str) -> str:
    text = f"{100 * value:+.1f}" if is_accuracy(metric) else f"{value:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Return `41 s`, `6 min 32 s`, `2 h 05 min` or `3 d 4 h`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if (whole := round(seconds)) < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if (minutes := round(seconds / 60)) < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def setting(value: Any) -> str:
    """Return a configuration value as a space file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting, value))}]"
    return format_value(value)


def sort_key(value: float | None) -> str:
    """Return what the page's script sorts a cell by; nothing if it shows no number."""
    return "" if value is None or not math.isfinite(value) else f"{value:.12g}"


def spent_seconds(record: TrialRecord) -> float:
    """Return how long a trial kept its workers busy."""
    if record.reports:
        return record.reports[-1].seconds
    if record.ended_at is None:
        return 0.0
    return max(0.0, record.ended_at - (record.first_step_at or record.submitted_at))


# ---------------------------------------------------------------------- charts

Trace = dict[str, Any]
Curve = Sequence[tuple[float, float]]

KINDS = ("completed", "paused", "stopped", "failed", "running", "confirming")
"""Of trials that are drawn alike, in the order of the legend; those in `SearchFolder.special`
follow."""

_HOVER_WIDTH = 52
"""Characters of a line of hover text."""
_LONGEST_REASON = 260
"""Characters of a reason in a hover text; the table of trials has all of it."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, or why there is none."""

    name: str
    """Of its element in the page."""
    variants: Sequence[Mapping[str, Any]] = ()
    """What a switch changes between: each with a `label`, `traces`, `xaxis` and `yaxis`."""
    height: int = 380
    """In pixels."""
    empty: str = "Nothing to show yet."
    """What stands in its place without variants."""
    notes: Sequence[str] = ()
    """What a reader has to know."""


def trace(
    look: str,
    kind: str,
    x: Iterable[Any],
    y: Iterable[Any],
    name: str = "",
    trials: Iterable[str] | None = None,
    **more: Any,
) -> Trace:
    """Return points, lines or bars.

    Args:
        look: of `LOOKS` in `charts.js`.
        kind: of trials, or another colour of the style sheet.
        trials: the trial of each point; without it a pointer shows nothing there.
        more: plotly's attributes.
    """
    found = {"look": look, "kind": kind, "name": label(name), "x": [*x], "y": [*y], **more}
    return found if trials is None else {**found, "customdata": [*trials]}


def joined(curves: Mapping[str, Curve]) -> dict[str, list[Any]]:
    """Return the curves of several trials for one trace, with a gap after each."""
    gap = (None, None)
    points = [(*point, trial) for trial, curve in curves.items() for point in (*curve, gap)]
    x, y, trials = map(list, zip(*points, strict=True))
    return {"x": x, "y": y, "trials": trials}


def by_kind(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return the records by what is drawn alike, in the order of the legend."""
    groups: dict[str, list[TrialRecord]] = {kind: [] for kind in KINDS}
    for record in records:
        groups[kind_of(record)].append(record)
    return {kind: group for kind, group in groups.items() if group}


def kind_of(record: TrialRecord) -> str:
    is_confirming = record.confirms and record.state == "completed"
    return "confirming" if is_confirming else record.state


def values_by_trial(records: Iterable[TrialRecord], metric: str) -> dict[str, float]:
    """Return the metric of the trials that have one that is a number."""
    values = {r.trial_id: r.metrics[metric] for r in records if metric in r.metrics}
    return {trial: value for trial, value in values.items() if math.isfinite(value)}


def floor_of(values: Mapping[str, float]) -> float:
    """Return the height below all values at which trials without one are shown."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=1.0)
    return low - 0.08 * ((high - low) or abs(high) or 1.0)


def label(text: Any) -> str:
    """Return text that plotly shows as it is: it reads a few tags of HTML."""
    return html.escape(str(text), quote=False)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return plotly's axis; `scale` may give it a scale of `charts.js`."""
    return {"title": {"text": label(title)}, **more}


def metric_axis(metric: str, **more: Any) -> dict[str, Any]:
    """Return the axis of a metric: accuracies in percent."""
    return axis(metric, tickformat=".0%" if is_accuracy(metric) else "~g", **more)


def metric_hover(metric: str, axis: str = "y") -> str:
    """Return the line of hover text that gives the value at a point."""
    form = ".1%" if is_accuracy(metric) else ".4g"
    return f"{label(metric)} %{{{axis}:{form}}}"


def hover_texts(search: SearchFolder) -> dict[str, str]:
    """Return, by trial id, the text that is shown where the pointer is."""
    running = {f"trial-{n:04d}": f"trial {n}, not ended" for n in search.running}
    return running | {r.trial_id: _hover_text(r, search.metric) for r in search.runs}


def _hover_text(record: TrialRecord, metric: str) -> str:
    lines = [f"<b>{label(describe_run(record))}</b>, {record.state}"]
    for value in values_by_trial([record], metric).values():
        interval = interval_95(record.metrics, metric)
        ends = f" ({metric_interval(interval, metric)})" if interval else ""
        lines.append(f"{label(metric)} {metric_value(value, metric)}{ends}")
    lines += [f"{label(key)} {label(setting(v))}" for key, v in record.parameters.items()]
    lines.append(f"{count(record.samples_seen)} samples, {duration(spent_seconds(record))}")
    if record.reason:
        reason = textwrap.shorten(record.reason, _LONGEST_REASON, placeholder=" ...")
        lines += [label(part) for part in textwrap.wrap(reason, _HOVER_WIDTH)]
    return "<br>".join(lines)
