"""Where the time of the workers went: a bar for each leg of a trial, and the time that is lost."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovlm.messages import TrialRecord
from nanovlm.watch.report import style
from nanovlm.watch.report.folder import SearchFolder
from nanovlm.watch.report.progress_charts import time_unit
from nanovlm.watch.report.style import Chart, Trace, trace

INTERRUPTION_SECONDS = 600.0
"""If nobody works for longer than this, the search was interrupted: the time is cut out."""

KINDS = ("completed", "confirming", "paused", "stopped", "failed", "starting", "waiting", "idle")
"""What the time of the workers goes into, in the order of the report."""


@dataclass(frozen=True)
class Work:
    """One leg of a trial in a worker group; in seconds since the search began, breaks cut out."""

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
    """Number of the leg of its trial, from 1: higher ones follow a pause or a lost group."""


def works(search: SearchFolder) -> list[Work]:
    """Return what the worker groups did, in the order of its end."""
    legs = [(r, leg, number) for r in search.runs for number, leg in enumerate(r.legs, 1)]
    clock = _Clock([(leg.first_step_at or r.submitted_at, leg.ended_at) for r, leg, _ in legs])
    found = []
    last_end: dict[str, float] = {}
    for record, leg, number in sorted(legs, key=lambda entry: entry[1].ended_at):
        group, end = leg.worker_group, clock(leg.ended_at)
        due = clock(record.submitted_at)
        free = last_end.get(group, due)
        begun = max(free, due) if leg.first_step_at is None else clock(leg.first_step_at)
        is_first = group not in last_end
        found.append(Work(record, group, free, min(begun, end), end, is_first, number))
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


def spent_time(search: SearchFolder) -> dict[str, float]:
    """Return the seconds of all worker groups together, by what they went into (`KINDS`)."""
    seconds = dict.fromkeys(KINDS, 0.0)
    stage_ends: dict[tuple[bool, str], float] = {}
    for work in works(search):
        seconds[style.kind_of(work.record)] += work.ended_at - work.begun_at
        seconds["starting" if work.is_first else "waiting"] += work.begun_at - work.free_at
        stage_ends[work.record.confirms, work.group] = work.ended_at
    # The runs that confirm are a stage of their own, which may have other groups.
    for confirms in (False, True):
        ends = [end for (stage, _), end in stage_ends.items() if stage == confirms]
        seconds["idle"] += sum(max(ends) - end for end in ends)
    return {kind: max(0.0, spent) for kind, spent in seconds.items()}


def worker_chart(search: SearchFolder) -> Chart:
    """Return a line for each worker group, with a bar for each leg of a trial."""
    done = works(search)
    if not done:
        return Chart(name="workers", empty="No trial has ended yet.")
    name, unit = time_unit(max(work.ended_at for work in done))
    gaps = [work for work in done if not work.is_first]
    waits = [(work.begun_at - work.free_at) / unit for work in gaps]
    starts = [work.free_at / unit for work in gaps]
    rows = [style.label(work.group) for work in gaps]
    traces = [trace("gaps", "waiting", waits, rows, "waiting", base=starts)] if gaps else []
    for kind in style.KINDS:
        if own := [work for work in done if style.kind_of(work.record) == kind]:
            traces.append(_bars(kind, own, unit))
    groups = sorted({work.group for work in done}, key=lambda group: (len(group), group))
    variant = {
        "label": "",
        "traces": traces,
        "xaxis": style.axis(f"{name} since the first trial began"),
        "yaxis": {"categoryorder": "array", "categoryarray": [*map(style.label, groups)]},
    }
    return Chart(name="workers", variants=[variant], height=120 + 46 * len(groups))


def _bars(kind: str, done: Sequence[Work], unit: float) -> Trace:
    lengths = [(work.ended_at - work.begun_at) / unit for work in done]
    rows = [style.label(work.group) for work in done]
    trials = [work.record.trial_id for work in done]
    numbers = [f"{w.record.number} ({w.leg})" if w.leg > 1 else f"{w.record.number}" for w in done]
    starts = [work.begun_at / unit for work in done]
    return trace("legs", kind, lengths, rows, kind, trials, base=starts, text=numbers)
