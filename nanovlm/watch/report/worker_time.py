"""Where the time of the workers went: a bar for each leg of a trial, and the time that is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.watch.report.figure import STATE_STYLES, Chart, Variant, compact, label
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.progress_charts import time_unit

INTERRUPTION_SECONDS = 600.0
"""If nobody works for longer than this, the search was interrupted: the time is cut out."""

_PATTERNS = {
    "completed": "", "paused": "-", "stopped": "/", "failed": "x", "confirming": ".", "waiting": "",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a worker group did for one trial at one go; in seconds since the search began, breaks
    cut out."""

    record: TrialRecord
    group: str
    free_at: float
    """When the group had done what it did before; for its first trial when the trial was due."""
    begun_at: float
    """End of the first optimizer step, or where there was none, when it could begin."""
    ended_at: float
    is_first: bool
    """Whether it is the first of its group, which had to start."""
    leg: int
    """Place among the legs of its trial, from 1: higher ones follow a pause or a lost group."""

    @property
    def kind(self) -> str:
        if self.record.confirms and self.record.state == "completed":
            return "confirming"
        return self.record.state


@dataclass(frozen=True)
class Spent:
    """A share of the workers' time."""

    kind: str
    name: str
    seconds: float
    """Of all groups together."""


def works(search: SearchFolder) -> list[Work]:
    """Return what the worker groups did, in the order of its end."""
    legs = [(r, leg, place) for r in search.runs for place, leg in enumerate(r.legs, 1)]
    squeeze = _Clock([(leg.first_step_at or r.submitted_at, leg.ended_at) for r, leg, _ in legs])
    found = []
    last_end: dict[str, float] = {}
    for record, leg, place in sorted(legs, key=lambda entry: entry[1].ended_at):
        group, end = leg.worker_group, squeeze(leg.ended_at)
        due = squeeze(record.submitted_at)
        free = last_end.get(group, due)
        begun = max(free, due) if leg.first_step_at is None else squeeze(leg.first_step_at)
        is_first = group not in last_end
        found.append(Work(record, group, free, min(begun, end), end, is_first, place))
        last_end[group] = end
    return found


class _Clock:
    """Seconds since the first trial began, without the breaks in which nobody worked."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self._breaks: list[tuple[float, float]] = []
        ordered = sorted(spans)
        self._start = until = ordered[0][0] if ordered else 0.0
        for begin, end in ordered:
            if begin - until > INTERRUPTION_SECONDS:
                self._breaks.append((until, begin))
            until = max(until, end)

    def __call__(self, moment: float) -> float:
        cut = sum(min(moment, end) - begin for begin, end in self._breaks if moment > begin)
        return moment - self._start - cut


def spent_time(search: SearchFolder) -> list[Spent]:
    """Return what the time of all worker groups went into, and what of it was lost."""
    done = works(search)
    seconds = dict.fromkeys((*_NAMES,), 0.0)
    for work in done:
        seconds[work.kind] += work.ended_at - work.begun_at
        seconds["starting" if work.is_first else "waiting"] += work.begun_at - work.free_at
    seconds["idle"] = sum(_idle_ends(done))
    return [Spent(kind, _NAMES[kind], max(0.0, spent)) for kind, spent in seconds.items()]


_NAMES = {
    "completed": "full trials",
    "confirming": "runs that confirm",
    "paused": "trials that are paused",
    "stopped": "trials that were stopped early",
    "failed": "trials that failed",
    "starting": "start of the workers",
    "waiting": "waiting between trials",
    "idle": "nothing left to do at the end",
}


def _idle_ends(done: Sequence[Work]) -> Iterator[float]:
    """Yield how long each group had nothing to do before its stage was over.

    The runs that confirm are a stage of their own, which may have other groups.
    """
    for confirms in (False, True):
        stage = [work for work in done if work.record.confirms == confirms]
        ends = {work.group: work.ended_at for work in stage}  # the last one of each stays
        for end in ends.values():
            yield max(ends.values()) - end


def worker_chart(search: SearchFolder) -> Chart:
    """Return a line for each worker group, with a bar for each leg of a trial."""
    done = works(search)
    if not done:
        return Chart(name="workers", empty="No trial has ended yet.")
    unit, seconds = time_unit(max(work.ended_at for work in done))
    kinds: Mapping[str, list[Work]] = {
        kind: [work for work in done if work.kind == kind] for kind in _PATTERNS
    }
    traces = [_gaps([work for work in done if not work.is_first], seconds)]
    traces += [_bars(kind, own, seconds) for kind, own in kinds.items() if own]
    groups = sorted({work.group for work in done}, key=lambda name: (len(name), name))
    return Chart(
        name="workers",
        variants=[
            Variant(
                label="",
                traces=[trace for trace in traces if trace["x"]],
                layout={
                    "barmode": "overlay",
                    "bargap": 0.3,
                    "xaxis": {"title": {"text": f"{unit} since the first trial began"}},
                    "yaxis": {
                        "categoryorder": "array",
                        "categoryarray": [label(group) for group in groups],
                        "autorange": "reversed",
                        "automargin": True,
                        "showgrid": False,
                        "ticksuffix": "  ",
                    },
                    "uniformtext": {"mode": "hide", "minsize": 10},
                    "hovermode": "closest",
                },
            )
        ],
        height=120 + 46 * len(groups),
    )


def _bars(kind: str, done: Sequence[Work], unit: float) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "y": [label(work.group) for work in done],
        "base": [compact(work.begun_at / unit) for work in done],
        "x": [compact((work.ended_at - work.begun_at) / unit) for work in done],
        "customdata": [work.record.trial_id for work in done],
        "text": [
            f"{work.record.number} ({work.leg})" if work.leg > 1 else str(work.record.number)
            for work in done
        ],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": "var(--on-color)"},
        "marker": {
            "color": STATE_STYLES[kind]["color"],
            "line": {"color": "var(--card)", "width": 1},
            "pattern": {
                "shape": _PATTERNS[kind],
                "fgcolor": "var(--card)",
                "fillmode": "overlay",
                "fgopacity": 0.2,
                "size": 6,
            },
        },
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _gaps(done: Sequence[Work], unit: float) -> dict[str, Any]:
    """Return the time between the end of a trial and the first step of the next."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": "waiting",
        "y": [label(work.group) for work in done],
        "base": [compact(work.free_at / unit) for work in done],
        "x": [compact((work.begun_at - work.free_at) / unit) for work in done],
        "marker": {"color": "var(--waiting)"},
        "hovertemplate": "waiting and first step: %{x:.2g}<extra></extra>",
    }
