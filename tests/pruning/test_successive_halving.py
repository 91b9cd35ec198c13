"""The rules by which trials are stopped, against Ray Tune's own and the papers."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from ray.tune.schedulers import ASHAScheduler

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.pruning.successive_halving import StoppingHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import RUNGS_FILE

MILESTONES = (100, 300, 900)


def rungs(name: Any = "asha", mode: Literal["max", "min"] = "max", **more: Any) -> StoppingHalving:
    milestones = more.pop("milestones", MILESTONES)
    scheduler = Scheduler(name=name, reduction_factor=more.pop("factor", 3))
    return StoppingHalving(
        scheduler, milestones, objective=Objective(metric="score", mode=mode), **more
    )


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_asha_stops_the_trials_that_ray_stops(mode: Literal["max", "min"], factor: int) -> None:
    draw = random.Random(0)
    milestones = tuple(100 * factor**index for index in range(3))
    ours = rungs(mode=mode, factor=factor, milestones=milestones)
    rays = ASHAScheduler(
        time_attr="seen",
        metric="score",
        mode=mode,
        grace_period=100,
        reduction_factor=factor,
        max_t=100 * factor**3 + 1,
    )
    under_way = {number: 0 for number in range(8)}
    none: Any = None
    for number in under_way:
        rays.on_trial_add(none, SimpleNamespace(trial_id=str(number)))  # type: ignore[arg-type]
    stops = 0
    while under_way:
        number = draw.choice(sorted(under_way))
        seen, value = milestones[under_way[number]], round(draw.random(), 1)  # with equal ones
        trial: Any = SimpleNamespace(trial_id=str(number))
        goes_on = rays.on_trial_result(none, trial, {"seen": seen, "score": value}) == "CONTINUE"
        assert ours.decide(number, seen, value).goes_on == goes_on
        under_way[number] += 1
        stops += not goes_on
        if not goes_on or under_way[number] == 3:
            del under_way[number]
            if number < 200:
                under_way[number + 8] = 0
                rays.on_trial_add(none, SimpleNamespace(trial_id=str(number + 8)))  # type: ignore[arg-type]
    assert stops > 50


def test_a_report_goes_to_the_rung_that_it_was_made_at() -> None:
    judged = rungs()
    judged.decide(0, 304, 0.9)
    assert judged.decide(1, 128, 0.1).goes_on, "nobody has been at 100 samples"
    assert judged.decide(1, 320, 0.1).cutoff == 0.9


@pytest.mark.parametrize("name", ["asha", "hyperband", "pasha"])
def test_a_restored_log_decides_as_the_rungs_that_wrote_it(tmp_path: Path, name: str) -> None:
    draw = random.Random(1)
    reports = [(n, 100 * 3**rung, draw.random()) for n in range(60) for rung in range(3)]
    whole = rungs(name, seed=3)
    expected, log = list[PruningDecision](), tmp_path / RUNGS_FILE
    for index, (number, seen, value) in enumerate(reports):
        if any(decision.number == number and not decision.goes_on for decision in expected):
            continue
        expected.append(whole.decide(number, seen, value))
        parts = rungs(name, seed=3, log=log)
        assert parts.decide(number, seen, value) == expected[-1]
        if index % 20 == 19:
            whole.withdraw(number)
            parts.withdraw(number)
    assert len({decision.goes_on for decision in expected}) == 2


def test_hyperband_draws_its_brackets_as_often_as_it_gives_them_trials() -> None:
    judged = rungs("hyperband", seed=5)
    brackets = [judged.bracket(number) for number in range(4000)]
    assert brackets == [rungs("hyperband", seed=5).bracket(number) for number in range(4000)]
    counts = Counter(brackets)
    # With factor 3 Hyperband gives brackets of 3, 2, 1, 0 rungs 27/4, 9/3, 3/2, 1/1 trials of 4.
    shares = [27 / 4, 9 / 3, 3 / 2, 1 / 1]
    for bracket, share in enumerate(shares):
        assert counts[bracket] / 4000 == pytest.approx(share / sum(shares), abs=0.03)


def test_a_bracket_of_hyperband_starts_at_its_own_milestone() -> None:
    judged = rungs("hyperband")
    number = next(n for n in range(100) if judged.bracket(n) == 1)
    others = [n for n in range(100) if judged.bracket(n) == 0][:3]
    for other in others:
        judged.decide(other, 300, 0.9)
    assert judged.decide(number, 100, 0.0).goes_on
    decision = judged.decide(number, 300, 0.0)
    assert decision.goes_on and decision.rung_size == 0, "other brackets are not compared with"


def test_pasha_stops_at_the_second_milestone_while_the_order_is_clear() -> None:
    judged = rungs("pasha", factor=2)
    for number, value in enumerate([0.1, 0.2, 0.3, 0.4]):
        assert judged.decide(number, 100, value).goes_on
        decision = judged.decide(number, 300, value + 0.1)
        assert not decision.goes_on
        assert decision.reason.startswith("trials are in the same order at 300 samples")


def test_pasha_goes_further_when_the_order_changes() -> None:
    judged = rungs("pasha", factor=2)
    assert not judged.decide(0, 300, judged.decide(0, 100, 0.1).value).goes_on
    judged.decide(1, 100, 0.5)
    judged.decide(2, 100, 0.4)
    assert not judged.decide(1, 300, 0.6).goes_on
    judged.decide(3, 100, 0.45)
    assert judged.decide(3, 300, 0.9).goes_on, "3 was behind 1 before"
    assert not judged.decide(3, 900, 0.9).goes_on, "alone at the third milestone"


def test_pasha_takes_values_for_equal_that_cross_to_and_fro() -> None:
    judged = rungs("pasha", factor=2, milestones=(1, 2, 3, 4))
    judged._limit = 3
    for number, curve in enumerate([(0.50, 0.52, 0.60), (0.51, 0.51, 0.61)]):
        for milestone, value in enumerate(curve, 1):
            last = judged.decide(number, milestone, value)
    assert not last.goes_on, "a difference of 0.01 says nothing"
