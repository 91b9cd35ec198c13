"""ASHA: where trials are compared, what is stopped and why."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovlm.distributed.trainable import NUMBER, SAMPLES_SEEN
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.search.scheduler import AshaWithReasons, build_scheduler, plan_milestones
from nanovlm.search.space import SearchSpace, load_space


def space(tmp_path: Path, **overrides: Any) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: default}\nbase: {batch_size: 100}")
    return load_space(path, overrides)


@pytest.mark.parametrize(
    ("rungs", "factor", "budget", "milestones"),
    [
        (4, 3, 27_000, (1000, 3000, 9000)),
        (4, 3, 27_026, (1000, 3000, 9000)),
        (3, 4, 10_000, (625, 2500)),
        (2, 2, 1_001, (500,)),
        (1, 3, 27_000, ()),
    ],
)
def test_milestones_are_counted_back_from_the_budget(
    tmp_path: Path, rungs: int, factor: int, budget: int, milestones: tuple[int, ...]
) -> None:
    overrides = {"scheduler.rungs": rungs, "scheduler.reduction_factor": factor}
    assert plan_milestones(space(tmp_path, **overrides), budget) == milestones


def test_no_milestones_without_a_scheduler(tmp_path: Path) -> None:
    assert plan_milestones(space(tmp_path, **{"scheduler.name": "none"}), 1000) == ()


def test_a_plan_longer_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan_milestones(space(tmp_path, **{"scheduler.rungs": 6}), 20_000)
    assert "at least one batch of 100 samples, but 6 rungs" in str(caught.value)
    assert "put it at 82 of the 20000 samples" in str(caught.value)
    assert "choose at most 5 rungs" in str(caught.value)
    plan_milestones(space(tmp_path, **{"scheduler.rungs": 5}), 20_000)
    with pytest.raises(UserError, match="choose at most 1 rungs"):
        plan_milestones(space(tmp_path), 50)


class Trials:
    """Feeds a scheduler as Tune does."""

    def __init__(self, scheduler: AshaWithReasons) -> None:
        self.scheduler = scheduler

    def report(self, number: int, samples: int, value: float) -> str:
        trial: Any = SimpleNamespace(trial_id=f"tune-{number}", config={NUMBER: number})
        if trial.trial_id not in self.scheduler._trial_info:
            self.scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        result = {SAMPLES_SEEN: samples, "mmstar_accuracy": value}
        return self.scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
@pytest.mark.parametrize("rungs", [2, 3, 4, 5])
def test_ray_compares_exactly_at_our_milestones(tmp_path: Path, rungs: int, factor: int) -> None:
    planned = space(tmp_path, **{"scheduler.rungs": rungs, "scheduler.reduction_factor": factor})
    for budget in (100 * factor**rungs, 100 * factor**rungs + 37):
        milestones = plan_milestones(planned, budget)
        scheduler = build_scheduler(planned, milestones, budget)
        assert isinstance(scheduler, AshaWithReasons)
        compared = [int(milestone) for milestone, _ in scheduler._brackets[0]._rungs]
        assert sorted(compared)[: len(milestones)] == list(milestones)


def test_a_bad_trial_is_stopped_at_the_rung_with_a_reason(tmp_path: Path) -> None:
    scheduler = build_scheduler(space(tmp_path), (1000, 3000, 9000), 27_000)
    assert isinstance(scheduler, AshaWithReasons)
    trials = Trials(scheduler)
    for number, value in enumerate([0.5, 0.6, 0.7]):
        assert trials.report(number, 1000, value) == "CONTINUE"
    assert trials.report(3, 1000, 0.4) == "STOP"
    assert scheduler.reasons == {
        3: "mmstar_accuracy 0.4 below 0.6333, the cutoff of 3 trials at 1000 samples"
    }
    assert trials.report(4, 1024, 0.8) == "CONTINUE"
    assert trials.report(4, 3000, 0.1) == "CONTINUE"  # the first at its rung


def test_a_result_that_asha_cannot_read_is_not_passed_over(tmp_path: Path) -> None:
    scheduler = build_scheduler(space(tmp_path), (1000,), 3000)
    trial: Any = SimpleNamespace(trial_id="t", config={NUMBER: 0})
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="ASHA cannot read"):
        scheduler.on_trial_result(None, trial, {"mmstar_accuracy": 1.0})  # type: ignore[arg-type]


def test_the_rungs_of_an_earlier_run_count(tmp_path: Path) -> None:
    scheduler = build_scheduler(space(tmp_path), (1000, 3000, 9000), 27_000)
    assert isinstance(scheduler, AshaWithReasons)
    scheduler.replay([record(0, [(1024, 0.5), (3000, 0.6)]), record(1, [(1000, 0.7)])])
    trials = Trials(scheduler)
    assert trials.report(2, 1000, 0.6) == "STOP"
    assert "0.6333, the cutoff of 2 trials at 1000 samples" in scheduler.reasons[2]
    assert trials.report(3, 1000, 0.8) == "CONTINUE"
    assert trials.report(3, 3000, 0.5) == "STOP"
    assert "0.6, the cutoff of 1 trials at 3000 samples" in scheduler.reasons[3]


def record(number: int, reports: list[tuple[int, float]]) -> TrialRecord:
    return TrialRecord(
        trial_id=f"trial-{number}",
        number=number,
        parameters={},
        config={},
        state="stopped",
        reports=tuple(
            {"samples_seen": samples, "metrics": {"mmstar_accuracy": value}}
            for samples, value in reports
        ),
        submitted_at=0.0,
    )
