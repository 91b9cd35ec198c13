"""The simulated clock: what waits for the search, what pauses cost, and trials that go on."""

from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from benchmarks.replay_clock import Costs, LastValues, Reached, Run, Trace, picks_by, simulate
from benchmarks.replay_search import TuneLoop
from benchmarks.replay_table import CurveTable, coordinate, value_at
from nanovlm.cluster.relay import IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.config.parameter import Kind, Parameter

KEY = Parameter(key="x", kind="uniform", values=(0.0, 1.0), when={})
SEEN = np.array([[10, 30, 90]] * 4)
VALUES_SEEN = np.array([[0.5, 0.6, 0.7], [0.4, 0.5, 0.8], [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]])
TABLE = CurveTable((KEY,), np.array([[0.0], [0.3], [0.6], [0.9]]), SEEN, VALUES_SEEN)


class Scripted:
    """Starts runs in their order, each of which goes on so often at once; searching takes time."""

    def __init__(self, runs: list[tuple[Run, int]], seconds: float = 0.0, **says: bool) -> None:
        self._runs = runs
        self._left: dict[str, int] = {}
        self._seconds = seconds
        self.pauses, self.prepares = says.get("pauses", False), says.get("prepares", False)
        self.clock = 0.0
        self.asked = list[str]()

    def start(self) -> Run | None:
        self.clock += self._seconds
        self.asked.append("start")
        if not self._runs:
            return None
        run, self._left[run.trial_id] = self._runs.pop(0)
        return run

    def report(self, run: Run) -> bool:
        self.asked.append(run.trial_id)
        self._left[run.trial_id] -= 1
        return self._left[run.trial_id] >= 0

    def simulate(self, slots: int, limit: int = 10_000, rate: float = 1.0) -> Trace:
        return simulate(TABLE, self, slots, limit, Costs(samples_per_second=rate))

    def seconds(self) -> float:
        return self.clock


def runs(*rows: int, columns: tuple[int, ...] = (0,)) -> list[tuple[Run, int]]:
    return [(Run(f"trial-{row}", row, columns), 0) for row in rows]


def times(trace: Trace) -> list[float]:
    return [report.time for report in trace.reports]


def test_without_costs_only_training_takes_time() -> None:
    trace = Scripted(runs(0, 1, 2), seconds=2).simulate(slots=1, rate=0)
    assert times(trace) == [10, 20, 30] and trace.spent == 30
    assert trace.search_seconds == 4 * 2, "three suggestions, and one that had none"


def test_slots_wait_one_after_another_for_the_search() -> None:
    trace = Scripted(runs(0, 1, 2, 3), seconds=2).simulate(slots=2)
    assert times(trace) == [2 + 10, 4 + 10, 12 + 2 + 10, 14 + 2 + 10]
    assert trace.spent == 40, "what waits does not train"


def test_a_report_waits_for_a_busy_search_and_goes_before_free_slots() -> None:
    method = Scripted([(Run("a", 0, (0, 1)), 1), (Run("b", 1, (0,)), 0)], seconds=12)
    # b is asked for from 12 to 24; a has reported at 22 and goes on at 24, for 20 samples.
    assert times(method.simulate(slots=2)) == [12 + 10, 24 + 10, 24 + 20]


def test_a_report_goes_before_a_slot_that_is_free_later() -> None:
    method = Scripted(runs(0, 1, 2, 3), seconds=0.05, pauses=True)
    for run, _ in method._runs:
        run.columns = (0, 1)
    method.simulate(slots=2, limit=40, rate=10)
    # Trial 0 reports at 10.5 and its slot is free at 11.5, trial 1 reports at 11.
    assert method.asked == ["start", "start", "trial-0", "trial-1", "start", "start"]


def test_a_prepared_suggestion_is_waited_for_only_if_it_takes_longer_than_training() -> None:
    assert times(Scripted(runs(0, 1), 2, prepares=True).simulate(1)) == [12, 22]
    assert times(Scripted(runs(0, 1), 15, prepares=True).simulate(1)) == [25, 15 + 15 + 10]


@pytest.mark.parametrize("pauses", [True, False])
def test_a_pause_costs_at_its_beginning_and_its_end(pauses: bool) -> None:
    paused, new = Run("a", 0, (0, 1)), Run("b", 1, (0,))
    method = Scripted([(paused, 0), (new, 0), (paused, 0)], pauses=pauses)
    first, other, second = times(method.simulate(slots=1, rate=10))
    pause = 0.1 * 10 if pauses else 0
    assert first == 10
    assert other == pytest.approx(first + pause + 10)
    assert second == pytest.approx(other + 0.1 * 10 + 20), "what ends has nothing to keep"


def test_the_limit_is_one_of_time_where_waiting_counts() -> None:
    counted = Scripted(runs(0, 1, 2, 3), seconds=10).simulate(slots=1, limit=45)
    assert times(counted) == [20, 40] and counted.spent == 20
    free = Scripted(runs(0, 1, 2, 3), seconds=10).simulate(slots=1, limit=45, rate=0)
    assert times(free) == [10, 20, 30, 40]


def test_an_idle_slot_asks_again_after_a_report() -> None:
    class Waits(Scripted):
        def start(self) -> Run | None:
            waits = len(self._runs) == 1 and not self.reported
            return None if waits else super().start()

        def report(self, run: Run) -> bool:
            self.reported = True
            return super().report(run)

        reported = False

    assert times(Waits(runs(0, 1)).simulate(slots=2)) == [10, 20]


class ScriptedSearcher(Searcher):
    """Suggests numbers in an order; None: nothing now."""

    def __init__(self, numbers: list[int | None]) -> None:
        super().__init__()
        self._numbers = numbers
        self.told: list[tuple[str, Any]] = []

    def suggest(self, trial_id: str) -> Any:
        number = self._numbers.pop(0) if self._numbers else Searcher.FINISHED
        if not isinstance(number, int):
            return number
        return {NUMBER: number, VALUES: {"x": TABLE.points[number, 0]}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.told.append((trial_id, result[SAMPLES_SEEN]))

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.told.append((trial_id, "end"))


class StopsAtMilestones(FIFOScheduler):
    """Pauses each trial at each milestone but those that it is told to let go on."""

    def __init__(self, going_on: set[tuple[int, int]]) -> None:
        super().__init__()
        self._going_on = going_on

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = (trial.config[NUMBER], result[SAMPLES_SEEN]) in self._going_on
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None: ...


def loop(numbers: list[int | None], pauses: bool = True) -> tuple[TuneLoop, ScriptedSearcher]:
    def describe(run: Run) -> dict[str, Any]:
        return {SAMPLES_SEEN: run.samples(TABLE), IS_FINAL: run.is_final}

    searcher = ScriptedSearcher(numbers)
    scheduler = StopsAtMilestones({(1, 10)})
    return TuneLoop(TABLE, searcher, scheduler, (10, 30), describe, pauses=pauses), searcher


def test_a_promoted_trial_goes_on_where_it_paused() -> None:
    method, searcher = loop([0, 1, 0, 0, 1])
    trace = simulate(TABLE, method, 1, 10_000)
    seen = [(report.row, report.column) for report in trace.reports]
    assert seen == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
    assert times(trace) == [10, 20, 40, 60, 120, 180], "nothing is trained twice"
    assert (trace.num_trials, trace.num_full, trace.spent) == (2, 2, 180)
    assert searcher.told == [
        ("trial-0000", "end"),
        ("trial-0001", 10),
        ("trial-0001", "end"),
        ("trial-0002", "end"),
        ("trial-0003", "end"),
        ("trial-0004", "end"),
    ], "each leg is a trial of its own for Tune"


def test_a_searcher_that_has_nothing_now_is_asked_again() -> None:
    method, _ = loop([0, None, 0, None, 0])
    trace = simulate(TABLE, method, 2, 10_000)
    assert times(trace) == [10, 30, 90]


def test_a_stopped_trial_is_over() -> None:
    method, _ = loop([0, 0], pauses=False)
    trace = simulate(TABLE, method, 1, 10_000)
    assert times(trace) == [10, 20] and trace.num_trials == 2


def test_the_highest_last_value_is_picked_wherever_it_was_reported() -> None:
    reports = [
        Reached(float(time), float(time), row, column, value)
        for time, (row, column, value) in enumerate(
            [(5, 0, 0.5), (6, 0, 0.7), (7, 2, 0.6), (6, 1, 0.4), (5, 1, 0.6), (7, 3, 0.61)]
        )
    ]
    picks = picks_by(LastValues(), reports)
    assert [(pick.time, pick.row) for pick in picks] == [(0, 5), (1, 6), (3, 7), (4, 5), (5, 7)]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("uniform", (0.1, 0.99)),
        ("log_uniform", (1e-4, 0.1)),
        ("int", (1, 5)),
        ("log_int", (16, 512)),
        ("choice", (16, 32, 64)),
    ],
)
def test_places_of_values(kind: Kind, values: tuple[Any, ...]) -> None:
    parameter = Parameter(key="x", kind=kind, values=values, when={})
    assert (value_at(parameter, 0.0), value_at(parameter, 1.0)) == (values[0], values[-1])
    middle = value_at(parameter, 0.5)
    assert coordinate(parameter, middle) == pytest.approx(0.5, abs=0.005)
    assert type(middle) is type(values[0])
