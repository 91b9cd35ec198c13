"""Simulated searches: what they count, and that the real rule decides."""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.config.space import load_space
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.pruning.simulation import SimulatedSearch, simulate
from nanovlm.pruning.successive_halving import StoppingHalving
from nanovlm.results.decisions import PruningDecision

MILESTONES = (100, 300)


class Rule(StoppingHalving):
    """Decides by a function of number, samples seen and value."""

    def __init__(self, goes_on: Callable[[int, int, float], bool]) -> None:
        super().__init__(Scheduler(type="stopping"), MILESTONES, objective=Objective())
        self.goes_on = goes_on

    def decide(
        self, number: int, samples_seen: int, value: float, *others: float
    ) -> PruningDecision:
        goes_on = self.goes_on(number, samples_seen, value)
        return PruningDecision(number, samples_seen, samples_seen, value, goes_on, "")


def test_all_go_on() -> None:
    searched = simulate(Rule(lambda *_: True), MILESTONES, 900, num_trials=5, concurrency=2)
    assert searched.reached == [5, 5, 5]
    assert (searched.samples, searched.num_reports) == (4500, 15)
    assert searched.duration == pytest.approx(2700, abs=0.1)  # three in a row on one slot


def test_all_stop_and_reports_take_time() -> None:
    searched = simulate(
        Rule(lambda *_: False), MILESTONES, 900, num_trials=4, concurrency=2, report_cost=50
    )
    assert searched.reached == [4, 0, 0]
    assert searched.samples == 400
    assert searched.duration == pytest.approx(300, abs=0.1)


def test_the_rule_is_asked_at_milestones_with_correlated_values() -> None:
    asked: dict[int, list[tuple[int, float]]] = {}

    def goes_on(number: int, samples_seen: int, value: float) -> bool:
        asked.setdefault(number, []).append((samples_seen, value))
        return True

    simulate(Rule(goes_on), MILESTONES, 900, num_trials=3, concurrency=3, correlation=1.0)
    for (first, value), (second, later) in asked.values():
        assert (first, second) == MILESTONES
        assert value == later
    assert len({values[0][1] for values in asked.values()}) == 3


def test_asha_stops_most_trials_and_none_stops_none(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: default}")
    space = load_space(path, {"scheduler.reduction_factor": 3, "scheduler.type": "stopping"})
    rule = build_rungs(space, MILESTONES)
    searched = simulate(rule, MILESTONES, 900, num_trials=300, concurrency=4)
    assert searched.reached[0] == 300
    assert 0.28 < searched.reached[1] / 300 < 0.45
    assert 0.28 < searched.reached[2] / searched.reached[1] < 0.6
    assert searched.most_paused == searched.num_retrained == 0
    patient = load_space(path, {"scheduler.name": "none"})
    all_run = simulate(build_rungs(patient, ()), (), 900, num_trials=7, concurrency=4)
    assert all_run.reached == [7]


def pausing(num_trials: int, concurrency: int = 1, **more: Any) -> SimulatedSearch:
    scheduler = Scheduler(name="asha", type="pausing", reduction_factor=3)
    rule = PausingHalving(scheduler, MILESTONES, objective=Objective())
    settings: dict[str, Any] = {"num_trials": num_trials, "concurrency": concurrency, **more}
    return simulate(rule, MILESTONES, 900, **settings)


def test_of_trials_that_pause_only_the_best_go_on() -> None:
    """One slot and an order that never changes: a third goes on, and a third of these."""
    searched = pausing(90)
    assert searched.reached[0] == 90
    assert 30 <= searched.reached[1] < 45, "some looked good for a while"
    assert 0.3 < searched.reached[2] / searched.reached[1] < 0.5
    full = searched.reached[2]
    again = searched.reached[1] - full
    assert searched.samples == 100 * (90 - full - again) + 300 * again + 900 * full
    assert searched.num_reports == sum(searched.reached)
    assert searched.duration == pytest.approx(searched.samples), "the slot never waits"
    assert searched.num_retrained == 0 and 10 < searched.most_paused < 90


def test_what_slots_do_does_not_change_how_many_end() -> None:
    few, many = pausing(60, concurrency=1), pausing(60, concurrency=8)
    assert many.reached[0] == 60 and abs(many.reached[2] - few.reached[2]) <= 4
    assert many.duration < few.duration / 4


def test_trials_whose_state_was_let_go_train_again() -> None:
    kept, let_go = (pausing(60, correlation=0.8, most_states=most) for most in (None, 0))
    assert let_go.reached == kept.reached, "who goes on is another matter"
    num_again = let_go.num_retrained
    assert kept.num_retrained == 0 and num_again >= 5
    assert num_again <= let_go.num_reports - kept.num_reports <= 2 * num_again
    assert 100 <= (let_go.samples - kept.samples) / num_again <= 300
    assert pausing(30, correlation=0.8, most_states=3).num_retrained > 0
    assert pausing(60, correlation=0.8, most_states=60) == kept


class AtTheEnd(PausingHalving):
    """Lets every trial wait at its first milestone until no more begin, and keeps no state."""

    def __init__(self) -> None:
        scheduler = Scheduler(name="asha", type="pausing")
        super().__init__(scheduler, MILESTONES, objective=Objective())
        self.asked_as_last: list[bool] = []
        self.asked_for_hopeless: set[int] = set()

    def decide(
        self, number: int, samples_seen: int, value: float, *others: float
    ) -> PruningDecision:
        waits = samples_seen == MILESTONES[0]
        decision = PruningDecision(
            number, samples_seen, samples_seen, value, not waits, "", is_paused=waits
        )
        if waits:
            self._paused[number] = decision
        return decision

    def promote(
        self, is_last: bool = False, arrived: Container[int] | None = None
    ) -> PruningDecision | None:
        self.asked_as_last.append(is_last)
        return self._paused.pop(min(self._paused)) if is_last and self._paused else None

    def end_hopeless(
        self, most_trials: int, arrived: Container[int] | None = None
    ) -> list[PruningDecision]:
        self.asked_for_hopeless.add(most_trials)
        return []

    def least_promising(self, num_kept: int | None) -> list[int]:
        return list(self._paused)


def test_the_rule_is_asked_as_the_searcher_asks_it() -> None:
    rule = AtTheEnd()
    searched = simulate(rule, MILESTONES, 900, num_trials=2, concurrency=1)
    assert searched.reached == [2, 2, 2] and searched.most_paused == 2
    assert rule.asked_as_last == [False, False, True, True, True]
    assert rule.asked_for_hopeless == {2}
    # Each trains to 100, then again from its start to 300, and from its state to the end.
    assert searched.num_retrained == 2
    assert searched.samples == 2 * (100 + 300 + 600)
    assert searched.num_reports == 2 * (1 + 2 + 1)
