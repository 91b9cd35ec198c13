"""What the best configuration can do that the default one cannot, by MMStar's capabilities."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.results.statistics import NUM_ITEMS, wilson_interval
from nanovlm.watch.report.figure import STATE_STYLES, Chart, Variant, compact, label
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.wording import count, run_name

_PREFIX = "mmstar_accuracy/"
_WIDEST_LINE = 16
_ENOUGH_RUNS = 64
"""To tell how many questions a capability has."""


@dataclass(frozen=True)
class Side:
    """The runs of one configuration, of which the accuracies are averaged."""

    kind: str
    """`best` or `default`."""
    runs: Sequence[TrialRecord]

    @property
    def name(self) -> str:
        if len(self.runs) == 1:
            return f"{self.kind}, {run_name(self.runs[0])}"
        return f"{self.kind}, mean of {len(self.runs)} runs on fresh seeds"

    def accuracy(self, part: str) -> float | None:
        """Return the mean accuracy in a capability or an axis, by its name."""
        values = [run.metrics.get(_PREFIX + part) for run in self.runs]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class PartRow:
    """A capability, or an axis of one, of both sides."""

    name: str
    num_items: int | None
    default: float | None
    best: float | None


def sides(search: SearchFolder) -> list[Side]:
    """Return the default and the best configuration: confirming runs where both have them."""
    best = search.best
    if best is None:
        return [Side("default", [search.default])] if search.default else []
    runs = {
        kind: [r for r in search.confirmed if r.number == number and r.state == "completed"]
        for kind, number in (("default", DEFAULT_NUMBER), ("best", best.number))
    }
    if not all(runs.values()):
        trial = search.best_trial
        runs = {
            "default": [search.default] if search.default else [],
            "best": [trial] if trial else [],
        }
    if best.number == DEFAULT_NUMBER:
        del runs["best"]
    return [Side(kind, own) for kind, own in runs.items() if own]


def parts(search: SearchFolder, shown: Sequence[Side]) -> list[PartRow]:
    """Return the capabilities and their axes (`capability/axis`), in alphabetical order."""
    runs = [run for side in shown for run in side.runs]
    names = sorted(
        {key.removeprefix(_PREFIX) for r in runs for key in r.metrics if key.startswith(_PREFIX)}
    )
    sizes = num_items(search, runs)
    by_kind = {side.kind: side for side in shown}
    return [
        PartRow(
            name,
            sizes.get(name),
            *(
                by_kind[kind].accuracy(name) if kind in by_kind else None
                for kind in ("default", "best")
            ),
        )
        for name in names
    ]


def num_items(search: SearchFolder, runs: Sequence[TrialRecord]) -> Mapping[str, int]:
    """Return how many questions each capability has; nothing if the accuracies leave it open.

    Metrics do not say it, but each accuracy is a whole number of right answers divided by it: the
    least number that divides all of them without a rest can be read from the fractions. If these
    numbers add up to all questions they are right. The axes of a capability are found alike.
    """
    total = int(runs[0].metrics.get(NUM_ITEMS, 0)) if runs else 0
    same = [
        run.metrics
        for run in (*search.records, *search.confirmed)
        if run.metrics.get(NUM_ITEMS) == total and _same_part(run, runs[0])
    ][:_ENOUGH_RUNS]
    if not total or not same:
        return {}
    names = {key.removeprefix(_PREFIX) for metrics in same for key in metrics}
    names = {name for name in names if _PREFIX + name in same[0]}
    sizes = {
        name: math.lcm(
            *(
                Fraction(metrics[_PREFIX + name]).limit_denominator(total).denominator
                for metrics in same
                if _PREFIX + name in metrics
            )
        )
        for name in names
    }
    capabilities = {name for name in sizes if "/" not in name}
    if sum(sizes[name] for name in capabilities) != total:
        return {}
    return {
        name: size
        for name, size in sizes.items()
        if name in capabilities or _adds_up(name.partition("/")[0], sizes)
    }


def _same_part(run: TrialRecord, other: TrialRecord) -> bool:
    return run.config.get("mmstar_part") == other.config.get("mmstar_part")


def _adds_up(capability: str, sizes: Mapping[str, int]) -> bool:
    axes = [size for name, size in sizes.items() if name.startswith(f"{capability}/")]
    return sum(axes) == sizes[capability]


def capability_chart(search: SearchFolder) -> Chart:
    """Return bars for each capability, the default configuration's beside the best one's."""
    shown = sides(search)
    rows = [row for row in parts(search, shown) if "/" not in row.name]
    if not rows:
        return Chart(name="capabilities", empty="No full trial has been asked about capabilities.")
    has_intervals = all(row.num_items for row in rows)
    notes = ["The lines are 95 % intervals: what other questions of the kind might have given."]
    if not has_intervals:
        notes = ["No intervals: how many questions a capability has cannot be told yet."]
    return Chart(
        name="capabilities",
        variants=[Variant(label="", traces=[_bars(side, rows) for side in shown], layout=_LAYOUT)],
        height=110 + 34 * len(rows) * len(shown),
        notes=notes,
    )


_LAYOUT = {
    "barmode": "group",
    "bargap": 0.28,
    "bargroupgap": 0.08,
    "xaxis": {"tickformat": ".0%", "range": [0, 1.08], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
    "yaxis": {"automargin": True, "autorange": "reversed", "showgrid": False, "ticksuffix": "  "},
    "legend": {"traceorder": "normal"},
}


def _bars(side: Side, rows: Sequence[PartRow]) -> dict[str, Any]:
    values = [side.accuracy(row.name) or 0.0 for row in rows]
    intervals = [
        wilson_interval(value, row.num_items) if row.num_items else (value, value)
        for value, row in zip(values, rows, strict=True)
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "name": label(side.name),
        "y": [_wrapped(row.name) for row in rows],
        "x": [compact(value) for value in values],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [compact(high - v) for v, (_, high) in zip(values, intervals, strict=True)],
            "arrayminus": [compact(v - low) for v, (low, _) in zip(values, intervals, strict=True)],
            "color": "var(--ink)",
            "thickness": 1.4,
            "width": 4,
        },
        "marker": {
            "color": STATE_STYLES[side.kind]["color"],
            "pattern": {
                "shape": "/" if side.kind == "default" else "",
                "fgcolor": "var(--card)",
                "fillmode": "overlay",
                "fgopacity": 0.3,
                "size": 6,
            },
        },
        "hovertext": [
            f"<b>{label(row.name)}</b><br>{100 * value:.1f} %"
            + (f" ({100 * low:.1f} to {100 * high:.1f} %)" if row.num_items else "")
            + (f"<br>{count(row.num_items)} questions" if row.num_items else "")
            for row, value, (low, high) in zip(rows, values, intervals, strict=True)
        ],
        "hovertemplate": "%{hovertext}<extra>%{fullData.name}</extra>",
    }


def _wrapped(name: str) -> str:
    """Return a name in lines that a narrow screen has room for."""
    lines: list[str] = []
    for word in name.split():
        if lines and len(lines[-1]) + len(word) < _WIDEST_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "<br>".join(map(label, lines))
