"""A simulated clock: trials take their samples' time on a few concurrent slots.

Time is counted in samples that one slot trains. Evaluation, starting a trial and the search's own
work take none, so what is compared is what the methods spend on training.
"""

import heapq
import itertools
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from benchmarks.replay_table import CurveTable

ENOUGH_TRIALS = 3
"""So many must have come to a point for its values to choose between configurations there."""


@dataclass(eq=False)
class Run:
    """A trial on its way."""

    trial_id: str
    row: int
    """In the table."""
    columns: tuple[int, ...]
    """Of the table, in which the trial reports; ascending, the last is the end."""
    num_reports: int = 0
    """Made so far."""

    def samples(self, table: CurveTable) -> int:
        """Return the samples seen at the last report."""
        column = self.columns[self.num_reports - 1]
        return int(table.seen[self.row, column]) if self.num_reports else 0

    def value(self, table: CurveTable) -> float:
        """Return what the last report says."""
        return float(table.values[self.row, self.columns[self.num_reports - 1]])

    @property
    def is_final(self) -> bool:
        """Whether the last report was made at the end of the full training."""
        return self.num_reports == len(self.columns)


class Method(Protocol):
    """What decides which trials run, and how far."""

    def start(self) -> Run | None:
        """Return the trial that a free slot takes: a new one, or one that paused and goes on.

        None leaves the slot idle until another trial has reported.
        """
        ...

    def report(self, run: Run) -> bool:
        """Take in the report that a trial has just made; return whether it goes on at once."""
        ...


@dataclass(frozen=True)
class Pick:
    """From when on a method would have picked which configuration."""

    time: int
    """Samples that one slot trains from the start until then."""
    spent: int
    """Samples trained by all slots until then."""
    row: int


@dataclass(frozen=True)
class Reached:
    """A report: which row came to which column."""

    spent: int
    """Samples trained by all slots until then."""
    row: int
    column: int


@dataclass(frozen=True)
class Trace:
    """What a simulated search came to."""

    picks: tuple[Pick, ...]
    """By time, one for each change."""
    reports: tuple[Reached, ...]
    """By time."""
    time: int
    """At the last report."""
    spent: int
    num_trials: int
    """Trials that began."""
    num_full: int
    """Trials that ran in full."""

    def picked(self, *, spent: float | None = None, time: float | None = None) -> int | None:
        """Return the row picked once so much is spent or so late it is; None: none yet."""
        limit = spent if spent is not None else time
        assert limit is not None, "spent or time must be given"
        at = [pick.spent if spent is not None else pick.time for pick in self.picks]
        place = bisect_right(at, limit)
        return self.picks[place - 1].row if place else None


def simulate(table: CurveTable, method: Method, concurrency: int, limit: int) -> Trace:
    """Run a method until the next report would exceed the limit, or nothing is left to run.

    The pick is the best trial at the furthest point that ENOUGH_TRIALS have reached.

    Args:
        concurrency: trials at once.
        limit: samples trained by all slots together.
    """
    order = itertools.count()
    under_way: list[tuple[int, int, Run]] = []
    leaders = Leaders()
    picks = list[Pick]()
    reports = list[Reached]()
    begun: set[str] = set()
    now = spent = num_full = 0

    def go_on(run: Run) -> None:
        leg = int(table.seen[run.row, run.columns[run.num_reports]]) - run.samples(table)
        heapq.heappush(under_way, (now + leg, next(order), run))

    while True:
        while len(under_way) < concurrency and (run := method.start()) is not None:
            begun.add(run.trial_id)
            go_on(run)
        if not under_way or spent + len(under_way) * (under_way[0][0] - now) > limit:
            return Trace(tuple(picks), tuple(reports), now, spent, len(begun), num_full)
        spent += len(under_way) * (under_way[0][0] - now)
        now, _, run = heapq.heappop(under_way)
        run.num_reports += 1
        num_full += run.is_final
        reports.append(Reached(spent, run.row, run.columns[run.num_reports - 1]))
        row = leaders.add(reports[-1].column, run.value(table), run.row)
        if not picks or picks[-1].row != row:
            picks.append(Pick(now, spent, row))
        if method.report(run) and not run.is_final:
            go_on(run)


class Leaders:
    """The best row at each column, of those that a search has seen there."""

    def __init__(self) -> None:
        self._best: dict[int, tuple[float, int]] = {}  # value and row
        self._reached: Counter[int] = Counter()

    def add(self, column: int, value: float, row: int) -> int:
        """Take in a report; return the best row of the last column that enough trials reached."""
        self._reached[column] += 1
        self._best[column] = max(self._best.get(column, (value, row)), (value, row))
        usable = [c for c, reached in self._reached.items() if reached >= ENOUGH_TRIALS]
        return self._best[max(usable, default=min(self._reached))][1]
