"""A simulated clock: trials take their samples' time on a few concurrent slots.

Time is counted in samples that one slot trains. Evaluation and starting a trial take none. The
search's own work and pauses take none either unless `Costs` says how long a sample trains; then
reports and free slots wait for the search, which does one thing at a time.
"""

import heapq
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from benchmarks.replay_table import Curves

ENOUGH_TRIALS = 3
"""So many must have come to a point for its values to choose between configurations there."""

T = TypeVar("T")


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

    def samples(self, curves: Curves) -> int:
        """Return the samples seen at the last report."""
        column = self.columns[self.num_reports - 1]
        return curves.samples(self.row, column) if self.num_reports else 0

    def value(self, curves: Curves) -> float:
        """Return what the last report says."""
        return curves.value(self.row, self.columns[self.num_reports - 1])

    @property
    def is_final(self) -> bool:
        """Whether the last report was made at the end of the full training."""
        return self.num_reports == len(self.columns)


class Method(Protocol):
    """What decides which trials run, and how far."""

    @property
    def pauses(self) -> bool:
        """Whether a trial that does not go on at once may go on later, which costs a pause."""
        ...

    @property
    def prepares(self) -> bool:
        """Whether a suggestion is made while the slots train, beside the reports."""
        ...

    def start(self) -> Run | None:
        """Return the trial that a free slot takes: a new one, or one that paused and goes on.

        None leaves the slot idle until another trial has reported.
        """
        ...

    def report(self, run: Run) -> bool:
        """Take in the report that a trial has just made; return whether it goes on at once."""
        ...

    def seconds(self) -> float:
        """Return what the search's own work has taken since some moment: that of a processor, so
        that other programs on the machine do not count."""
        ...


@dataclass(frozen=True)
class Costs:
    """What takes time beside training."""

    samples_per_second: float = 0.0
    """That one slot trains; 0: nothing but training takes time."""
    pause_seconds: float = 0.1
    """From a trial's last report until its slot is free."""
    resume_seconds: float = 0.1
    """Until a trial that paused trains again."""


@dataclass(frozen=True)
class Reached:
    """A report: which row came to which column."""

    time: float
    """Samples that one slot trains from the start until then."""
    spent: float
    """Samples trained by all slots until then."""
    row: int
    column: int
    value: float
    """As it was reported."""


@dataclass(frozen=True)
class Pick:
    """From when on a method would have picked which configuration."""

    time: float
    spent: float
    row: int


class PickRule(Protocol):
    """Says after each report which row would be picked."""

    def add(self, column: int, value: float, row: int) -> int: ...


@dataclass(frozen=True)
class Trace:
    """What a simulated search came to."""

    reports: tuple[Reached, ...]
    """By time."""
    time: float
    """At the last report."""
    spent: float
    num_trials: int
    """Trials that began."""
    num_full: int
    """Trials that ran in full."""
    search_seconds: float
    """Of the search's own work, measured."""

    @cached_property
    def picks(self) -> tuple[Pick, ...]:
        """What a confirmation would run first, see `Leaders`; by time, one for each change."""
        return picks_by(Leaders(), self.reports)

    def picked(self, *, spent: float | None = None, time: float | None = None) -> int | None:
        """Return the row picked once so much is spent or so late it is; None: none yet."""
        return pick_at(self.picks, spent=spent, time=time)


def picks_by(rule: PickRule, reports: Iterable[Reached]) -> tuple[Pick, ...]:
    """Return what a fresh rule picks from reports, by time, one for each change."""
    picks = list[Pick]()
    for report in reports:
        row = rule.add(report.column, report.value, report.row)
        if not picks or picks[-1].row != row:
            picks.append(Pick(report.time, report.spent, row))
    return tuple(picks)


def pick_at(
    picks: Sequence[Pick], *, spent: float | None = None, time: float | None = None
) -> int | None:
    """Return the row picked once so much is spent or so late it is; None: none yet."""
    limit = spent if spent is not None else time
    assert limit is not None, "spent or time must be given"
    at = [pick.spent if spent is not None else pick.time for pick in picks]
    place = bisect_right(at, limit)
    return picks[place - 1].row if place else None


def simulate(
    curves: Curves, method: Method, concurrency: int, limit: int, costs: Costs | None = None
) -> Trace:
    """Run a method until the next report would exceed the limit, or nothing is left to run.

    Args:
        concurrency: trials at once.
        limit: samples trained by all slots together; with costs, what they could have trained.
    """
    clock = _Clock(curves, method, concurrency, costs or Costs())
    while True:
        if clock.may_ask():
            clock.ask()
        elif clock.may_report(limit):
            clock.take_report()
        else:
            return clock.trace()


@dataclass(order=True)
class _Leg:
    """A trial's way to its next report."""

    end: float
    order: int
    begin: float
    run: Run


class _Clock:
    """The slots, and the search that serves reports and free slots one after another.

    A report that has been made is served before a free slot whose turn comes later.
    """

    def __init__(self, curves: Curves, method: Method, concurrency: int, costs: Costs) -> None:
        self._curves, self._method, self._costs = curves, method, costs
        self._rate = costs.samples_per_second
        self._concurrency = concurrency
        self._order = itertools.count()
        self._legs = list[_Leg]()  # a heap
        self._free: list[float] = [0] * concurrency  # since when, a heap
        self._is_idle = False  # whether there was nothing to run since the last report
        self._search_free: float = 0  # from when on the search does nothing
        self._prepared_since: float = 0
        self._now: float = 0
        self._spent: float = 0
        self._reports = list[Reached]()
        self._begun = set[str]()
        self._num_full = 0
        self._search_seconds = 0.0

    def may_ask(self) -> bool:
        if self._is_idle or not self._free:
            return False
        return not self._legs or self._legs[0].end >= self._turn()

    def _turn(self) -> float:
        """Return when the search turns to the slot that has been free longest."""
        return max(self._free[0], self._search_free)

    def ask(self) -> None:
        turn = self._turn()
        run, work = self._timed(self._method.start)
        if self._method.prepares:
            ready = max(turn, self._prepared_since + work)
        else:
            ready = self._search_free = turn + work
        if run is None:
            self._is_idle = True
            return
        if not run.num_reports:
            self._prepared_since = ready
        heapq.heappop(self._free)
        self._begun.add(run.trial_id)
        self._go_on(run, ready + (self._rate * self._costs.resume_seconds) * bool(run.num_reports))

    def may_report(self, limit: int) -> bool:
        if not self._legs:
            return False
        end = self._legs[0].end
        return (end * self._concurrency if self._rate else self._spent_at(end)) <= limit

    def take_report(self) -> None:
        end = self._legs[0].end
        self._spent, self._now = self._spent_at(end), end
        run = heapq.heappop(self._legs).run
        run.num_reports += 1
        self._num_full += run.is_final
        column = run.columns[run.num_reports - 1]
        self._reports.append(Reached(end, self._spent, run.row, column, run.value(self._curves)))
        goes_on, work = self._timed(lambda: self._method.report(run))
        self._search_free = max(end, self._search_free) + work
        self._is_idle = False
        if goes_on and not run.is_final:
            self._go_on(run, self._search_free)
        else:
            is_pause = self._method.pauses and not run.is_final
            pause = self._rate * self._costs.pause_seconds if is_pause else 0
            heapq.heappush(self._free, self._search_free + pause)

    def trace(self) -> Trace:
        return Trace(
            reports=tuple(self._reports),
            time=self._now,
            spent=self._spent,
            num_trials=len(self._begun),
            num_full=self._num_full,
            search_seconds=self._search_seconds,
        )

    def _go_on(self, run: Run, begin: float) -> None:
        samples = self._curves.samples(run.row, run.columns[run.num_reports])
        end = begin + samples - run.samples(self._curves)
        heapq.heappush(self._legs, _Leg(end, next(self._order), begin, run))

    def _spent_at(self, time: float) -> float:
        """Return the samples that all slots have trained by a time that is not past."""
        return self._spent + sum(max(0, time - max(self._now, leg.begin)) for leg in self._legs)

    def _timed(self, do: Callable[[], T]) -> tuple[T, float]:
        """Return what is done, and how long it took in samples that one slot trains."""
        started = self._method.seconds()
        done = do()
        seconds = self._method.seconds() - started
        self._search_seconds += seconds
        return done, self._rate * seconds


class Leaders:
    """The best row at each column, of those that a search has seen there.

    The pick is the best trial at the furthest point that ENOUGH_TRIALS have reached.
    """

    def __init__(self) -> None:
        self._best: dict[int, tuple[float, int]] = {}  # value and row
        self._reached: Counter[int] = Counter()

    def add(self, column: int, value: float, row: int) -> int:
        """Take in a report; return the best row of the last column that enough trials reached."""
        self._reached[column] += 1
        self._best[column] = max(self._best.get(column, (value, row)), (value, row))
        usable = [c for c, reached in self._reached.items() if reached >= ENOUGH_TRIALS]
        return self._best[max(usable, default=min(self._reached))][1]


class LastValues:
    """What each row reported last; the pick is the highest, however far it came."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}

    def add(self, column: int, value: float, row: int) -> int:
        """Take in a report; return the row whose last value is highest, the first of equals."""
        self._values[row] = value
        return max(self._values, key=self._values.__getitem__)
