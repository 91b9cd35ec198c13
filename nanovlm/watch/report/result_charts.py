"""What the search has found: the trade-off between several objectives, and what the best
configuration can do that the default one cannot, by MMStar's capabilities."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from nanovlm.config.metrics import COSTS
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.results.pareto import Choice, choose, hypervolumes, values_of
from nanovlm.results.statistics import NUM_ITEMS, wilson_interval
from nanovlm.results.write import describe_run
from nanovlm.watch.report import style
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.style import Chart, Trace, trace

# ---------------------------------------------------------------------- the trade-off

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


def _front_variant(search: SearchFolder, choice: Choice, up: int, across: int) -> Mapping[str, Any]:
    """Return the trials by objective number `across`, to the right, and `up`."""
    objective = search.objective
    y, x = objective.all[up].metric, objective.all[across].metric
    values = {r.trial_id: v for r in search.trials if (v := values_of(objective, r)) is not None}
    at = f"{style.metric_hover(y)}, {style.metric_hover(x, 'x')}"
    hover = f"{at}<br>%{{hovertext}}<extra></extra>"

    def drawn(look: str, kind: str, name: str, records: Sequence[TrialRecord]) -> Trace:
        trials = [record.trial_id for record in records]
        xs, ys = ([values[trial][number] for trial in trials] for number in (across, up))
        return trace(look, kind, xs, ys, name, trials, hovertemplate=hover)

    special = {record.trial_id for record in (choice.record, *choice.front)}
    others = [r for r in search.trials if r.trial_id in values and r.trial_id not in special]
    traces = [drawn("small", kind, kind, own) for kind, own in style.by_kind(others).items()]
    if len(objective.all) == 2:  # else the edge of what the front dominates is no line
        # From the worst by the first objective on: to the right or left, then to the better value.
        traces.append(drawn("edge", "best", "front", choice.front[::-1]) | {"hoverinfo": "skip"})
    if front := [record for record in choice.front if record is not choice.record]:
        traces.append(drawn("front", "confirming", "on the front", front))
    traces.append(drawn("chosen", "best", "chosen", [choice.record]))
    low, high = min(v[across] for v in values.values()), max(v[across] for v in values.values())
    is_log = x in COSTS and high > _LOG_RATIO * low
    scale = {"scale": {"kind": "log", "low": low, "high": high}} if is_log else {}
    return {
        "label": f"{y} against {x}",
        "traces": traces,
        "xaxis": style.metric_axis(x, **scale),
        "yaxis": style.metric_axis(y),
    }


def hypervolume_chart(search: SearchFolder) -> Chart:
    """Return how much of what the front now encloses was there after each trial."""
    ended = sorted(search.records, key=lambda record: record.ended_at or 0.0)
    shares = hypervolumes(ended, search.objective)
    hover = "after %{x} trials: %{y:.3f}<extra></extra>"
    numbers = range(1, len(shares) + 1)
    variant = {
        "label": "",
        "traces": [trace("steps", "best", numbers, shares, "hypervolume", hovertemplate=hover)],
        "xaxis": style.axis("trials that have ended", rangemode="tozero"),
        "yaxis": style.axis("hypervolume", rangemode="tozero"),
    }
    shown = [variant] if any(shares) else ()
    return Chart(name="hypervolume", variants=shown, height=280, empty=_EMPTY)


# ---------------------------------------------------------------------- capabilities

_PREFIX = "mmstar_accuracy/"
_LABEL_WIDTH = 16
_ENOUGH_RUNS = 64
"""To work out how many questions a capability has."""


class Capability(NamedTuple):
    """A capability of MMStar, or an axis of one."""

    name: str
    """`capability` or `capability/axis`."""
    num_items: int | None
    """How many questions it has; None if that is not known."""
    accuracies: Mapping[str, float | None]
    """Of the `default` and the `best` configuration, as far as they are there."""


def compared_runs(search: SearchFolder) -> dict[str, list[TrialRecord]]:
    """Return runs of the `default` and the `best` configuration: confirming runs where both have
    them."""
    runs = {kind: [record] for kind, record in search.special.items()}
    if search.best is not None:
        confirming = {
            kind: [r for r in search.confirmed if r.number == number and r.state == "completed"]
            for kind, number in (("default", DEFAULT_NUMBER), ("best", search.best.number))
        }
        runs = confirming if all(confirming.values()) else runs
        if search.best.number == DEFAULT_NUMBER:
            runs.pop("best", None)
    return runs


def capabilities(search: SearchFolder) -> list[Capability]:
    """Return the capabilities and their axes, in alphabetical order."""
    compared = compared_runs(search)
    runs = [run for own in compared.values() for run in own]
    sizes = num_items(search, runs)
    found = []
    for name in sorted({key.partition(_PREFIX)[2] for run in runs for key in run.metrics} - {""}):
        accuracies = {}
        for kind, own in compared.items():
            known = [r.metrics[_PREFIX + name] for r in own if _PREFIX + name in r.metrics]
            accuracies[kind] = statistics.fmean(known) if known else None
        found.append(Capability(name, sizes.get(name), accuracies))
    return found


def num_items(search: SearchFolder, runs: Sequence[TrialRecord]) -> Mapping[str, int]:
    """Return how many questions each capability has; nothing if the accuracies leave it open.

    Metrics do not say it, but each accuracy is a whole number of right answers divided by it: the
    least number that divides all of them without a rest can be read from the fractions. If these
    numbers add up to all questions they are right. The axes of a capability are found alike.
    """

    def asked(run: TrialRecord) -> tuple[int, Any]:
        return int(run.metrics.get(NUM_ITEMS, 0)), run.config.get("mmstar_part")

    if not runs or not (total := asked(runs[0])[0]):
        return {}
    same = [r.metrics for r in (*search.records, *search.confirmed) if asked(r) == asked(runs[0])]
    sizes: dict[str, int] = {}
    for key, value in (item for metrics in same[:_ENOUGH_RUNS] for item in metrics.items()):
        if name := key.partition(_PREFIX)[2]:
            fraction = Fraction(value).limit_denominator(total)
            sizes[name] = math.lcm(sizes.get(name, 1), fraction.denominator)
    whole = {name: size for name, size in sizes.items() if "/" not in name}
    if sum(whole.values()) != total:
        return {}
    for capability, size in whole.items():
        axes = {n: s for n, s in sizes.items() if n.startswith(f"{capability}/")}
        whole = whole | axes if sum(axes.values()) == size else whole
    return whole


def capability_chart(search: SearchFolder) -> Chart:
    """Return bars for each capability, the default configuration's beside the best one's."""
    rows = [row for row in capabilities(search) if "/" not in row.name]
    if not rows:
        return Chart(name="capabilities", empty="No full trial has been asked about capabilities.")
    note = "No intervals: how many questions a capability has is not known yet."
    if all(row.num_items for row in rows):
        note = "The lines are 95 % intervals: what other questions of the kind might have given."
    compared = compared_runs(search)
    traces = [_bars(kind, runs, rows) for kind, runs in compared.items()]
    ticks = {"tickformat": ".0%", "range": [0, 1.08], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    height = 110 + 34 * len(rows) * len(compared)
    variant = {"label": "", "traces": traces, "xaxis": ticks}
    return Chart(name="capabilities", variants=[variant], height=height, notes=[note])


def _bars(kind: str, runs: Sequence[TrialRecord], rows: Sequence[Capability]) -> Trace:
    values = [row.accuracies[kind] or 0.0 for row in rows]
    above, below, texts = [], [], []
    for row, value in zip(rows, values, strict=True):
        low, high = wilson_interval(value, row.num_items) if row.num_items else (value, value)
        above.append(high - value)
        below.append(value - low)
        text = f"<b>{style.label(row.name)}</b><br>{style.metric_value(value, _PREFIX)}"
        if row.num_items:
            interval = style.metric_interval((low, high), _PREFIX)
            text += f" ({interval})<br>{style.count(row.num_items)} questions"
        texts.append(text)
    which = describe_run(runs[0]) if len(runs) == 1 else f"mean of {len(runs)} runs on fresh seeds"
    # A narrow screen has no room for a long name in one line.
    names = ["<br>".join(map(style.label, textwrap.wrap(r.name, _LABEL_WIDTH))) for r in rows]
    return trace(
        "bars",
        kind,
        values,
        names,
        f"{kind}, {which}",
        error_x={"array": above, "arrayminus": below},
        hovertext=texts,
        hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
    )
