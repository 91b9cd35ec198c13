"""Where trials are compared, and what Tune is told of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovlm.cluster.relay import FAILURE, IS_FINAL, NUMBER, SAMPLES_SEEN
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.pruning.pausing_halving import build_rungs
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import RUNGS_FILE
from nanovlm.search.plan import plan_milestones
from nanovlm.search.searcher import RungScheduler
from tests.full_disk import files_end_at


def space(tmp_path: Path, **overrides: Any) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(
        "search: {lr_mp: default}\nbase: {batch_size: 100}\nscheduler: {type: stopping}"
    )
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


def scheduler_of(
    space: SearchSpace,
    milestones: tuple[int, ...],
    folder: Path | None = None,
    on_decision: Callable[[PruningDecision], None] = lambda decision: None,
    **more: Any,
) -> RungScheduler:
    rungs = build_rungs(space, milestones, folder and folder / RUNGS_FILE)
    return RungScheduler(rungs, on_decision, **more)


def trial(number: int, begins_again: bool = False) -> Any:
    """Return as much of a trial of Tune as the scheduler looks at."""
    return SimpleNamespace(
        trial_id=f"tune-{number}", config={NUMBER: number}, should_recover=lambda: begins_again
    )


def report(scheduler: RungScheduler, number: int, samples: int, value: float, **more: Any) -> str:
    result = {SAMPLES_SEEN: samples, "mmstar_accuracy": value, **more}
    return scheduler.on_trial_result(None, trial(number), result)  # type: ignore[arg-type]


def test_a_bad_trial_is_stopped_with_a_reason(tmp_path: Path) -> None:
    scheduler = scheduler_of(space(tmp_path), (1000, 3000, 9000))
    for number, value in enumerate([0.5, 0.6, 0.7]):
        assert report(scheduler, number, 1000, value) == "CONTINUE"
    assert report(scheduler, 3, 1000, 0.4) == "STOP"
    assert scheduler.rungs.decide(3, 1000, 0.4).reason == (
        "mmstar_accuracy 0.4 below 0.6333, the cutoff of 3 trials at 1000 samples"
    )
    assert report(scheduler, 4, 1024, 0.8) == "CONTINUE"
    assert report(scheduler, 4, 3000, 0.1) == "CONTINUE"  # the first at its rung


def test_a_final_or_failed_result_is_compared_with_nothing(tmp_path: Path) -> None:
    scheduler = scheduler_of(space(tmp_path), (1000, 3000))
    report(scheduler, 0, 3000, 0.9)
    assert report(scheduler, 1, 9000, 0.1, **{IS_FINAL: True}) == "CONTINUE"
    assert report(scheduler, 2, 0, math.nan, **{FAILURE: "loss is nan"}) == "CONTINUE"


@pytest.mark.parametrize("how", ["failed", "errored"])
def test_a_failed_trial_leaves_no_value_behind(tmp_path: Path, how: str) -> None:
    scheduler = scheduler_of(space(tmp_path), (1000, 3000), tmp_path)
    report(scheduler, 0, 1000, 0.9)
    none: Any = None
    if how == "failed":
        scheduler.on_trial_complete(none, trial(0), {FAILURE: "loss is nan"})
    else:
        scheduler.on_trial_error(none, trial(0))
    for again in (scheduler, scheduler_of(space(tmp_path), (1000, 3000), tmp_path)):
        assert report(again, 1, 1000, 0.1) == "CONTINUE"


def test_a_trial_that_tune_begins_again_keeps_its_values_and_verdicts(tmp_path: Path) -> None:
    decisions: list[PruningDecision] = []
    scheduler = scheduler_of(space(tmp_path), (1000, 3000), tmp_path, decisions.append)
    assert report(scheduler, 0, 1000, 0.5) == "CONTINUE"
    assert report(scheduler, 1, 1000, 0.9) == "CONTINUE"
    none: Any = None
    scheduler.on_trial_error(none, trial(0, begins_again=True))
    assert report(scheduler, 0, 1000, 0.5) == "CONTINUE"  # though it is the worse one by now
    assert decisions[2] == decisions[0] and decisions[1].rung_size == 1


def test_what_was_decided_is_there_when_the_search_goes_on(tmp_path: Path) -> None:
    scheduler = scheduler_of(space(tmp_path), (1000, 3000), tmp_path)
    values = [(0, 0.5), (1, 0.6), (2, 0.3)]
    decided = [report(scheduler, number, 1000, value) for number, value in values]
    with (tmp_path / RUNGS_FILE).open("a") as log:
        log.write('{"number": 3, "milest')  # a power loss
    again = scheduler_of(space(tmp_path), (1000, 3000), tmp_path)
    assert [report(again, number, 1000, value) for number, value in values] == decided
    assert report(again, 4, 1000, 0.55) == report(scheduler, 4, 1000, 0.55)
    lines = [json.loads(line) for line in (tmp_path / RUNGS_FILE).read_text().splitlines()]
    assert [line["rung_size"] for line in lines] == [0, 1, 2, 3, 3]


def test_a_verdict_that_cannot_be_written_ends_the_search_and_no_trial(tmp_path: Path) -> None:
    """Tune would take the error for one of the trial's and begin it again."""
    failures: list[Exception] = []
    decisions: list[PruningDecision] = []
    scheduler = scheduler_of(
        space(tmp_path), (1000, 3000), tmp_path, decisions.append, on_failure=failures.append
    )
    assert report(scheduler, 0, 1000, 0.5) == "CONTINUE"
    before = (tmp_path / RUNGS_FILE).read_bytes()
    with files_end_at(len(before) + 10):
        assert report(scheduler, 1, 1000, 0.1) == "CONTINUE"
        none: Any = None
        scheduler.on_trial_complete(none, trial(0), {FAILURE: "no memory"})
    assert [str(error) for error in failures] == ["[Errno 27] File too large"] * 2
    assert [decision.number for decision in decisions] == [0]
    assert (tmp_path / RUNGS_FILE).read_bytes() == before
