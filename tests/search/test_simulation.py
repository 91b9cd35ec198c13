"""Simulated searches: what they count, and that the real rule decides."""

from pathlib import Path

import pytest

from nanovlm.search.simulation import scheduler_judge, simulate
from nanovlm.search.space import load_space

MILESTONES = (100, 300)


def test_all_go_on() -> None:
    searched = simulate(
        lambda number, samples, value: True, MILESTONES, 900, num_trials=5, concurrency=2
    )
    assert searched.reached == (5, 5, 5)
    assert (searched.samples, searched.num_reports) == (4500, 15)
    assert searched.duration == pytest.approx(2700, abs=0.1)  # three in a row on one slot


def test_all_stop_and_reports_take_time() -> None:
    searched = simulate(
        lambda number, samples, value: False,
        MILESTONES,
        900,
        num_trials=4,
        concurrency=2,
        report_cost=50,
    )
    assert searched.reached == (4, 0, 0)
    assert searched.samples == 400
    assert searched.duration == pytest.approx(300, abs=0.1)


def test_the_rule_is_asked_at_milestones_with_correlated_values() -> None:
    asked: dict[int, list[tuple[int, float]]] = {}

    def judge(number: int, samples_seen: int, value: float) -> bool:
        asked.setdefault(number, []).append((samples_seen, value))
        return True

    simulate(judge, MILESTONES, 900, num_trials=3, concurrency=3, correlation=1.0)
    for (first, value), (second, later) in asked.values():
        assert (first, second) == MILESTONES
        assert value == later
    assert len({values[0][1] for values in asked.values()}) == 3


def test_asha_stops_most_trials_and_none_stops_none(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: default}")
    space = load_space(path, {"scheduler.reduction_factor": 3})
    judge = scheduler_judge(space, MILESTONES)
    searched = simulate(judge, MILESTONES, 900, num_trials=300, concurrency=4)
    assert searched.reached[0] == 300
    assert 0.28 < searched.reached[1] / 300 < 0.45
    assert 0.28 < searched.reached[2] / searched.reached[1] < 0.6
    patient = load_space(path, {"scheduler.name": "none"})
    all_run = simulate(scheduler_judge(patient, ()), (), 900, num_trials=7, concurrency=4)
    assert all_run.reached == (7,)
