"""When a search ends before its number of trials."""

from pathlib import Path
from typing import Any

import pytest

from nanovlm.distributed.session import StopSwitch
from nanovlm.messages import TrialRecord, TrialState
from nanovlm.search.runner import Limits
from nanovlm.search.space import load_space


def limits(tmp_path: Path, **budget: Any) -> tuple[Limits, StopSwitch]:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: default}\nresources: {workers: 2, gpus_per_worker: 1}")
    switch = StopSwitch()
    space = load_space(path, {f"budget.{key}": value for key, value in budget.items()})
    return Limits(space, switch), switch


def record(state: TrialState, accuracy: float, seconds: float = 900.0) -> TrialRecord:
    metrics = {"mmstar_accuracy": accuracy}
    return TrialRecord(
        trial_id="trial-0000",
        number=0,
        parameters={},
        config={},
        state=state,
        reason="loss is nan" if state == "failed" else None,
        metrics=metrics,
        reports=({"samples_seen": 1, "step": 1, "seconds": seconds, "metrics": metrics},),
        submitted_at=0.0,
    )


def test_the_target_counts_for_trials_of_full_length(tmp_path: Path) -> None:
    checked, switch = limits(tmp_path, target=0.9)
    checked.check(record("stopped", 0.95))
    checked.check(record("running", 0.95))
    checked.check(record("completed", 0.89))
    assert switch.reason is None
    checked.check(record("completed", 0.9))
    assert switch.reason == "the target of 0.9 is reached"


def test_gpu_hours_count_every_gpu_of_a_trial(tmp_path: Path) -> None:
    checked, switch = limits(tmp_path, gpu_hours=1.0)
    checked.check(record("stopped", 0.1, seconds=900.0))
    assert switch.reason is None
    checked.check(record("completed", 0.1, seconds=900.0))
    assert switch.reason == "the budget of 1 GPU-hours is spent"


def test_a_row_of_failures_ends_the_search_with_the_reason(tmp_path: Path) -> None:
    checked, switch = limits(tmp_path)
    for _ in range(4):
        checked.check(record("failed", 0.0))
    checked.check(record("completed", 0.5))
    for _ in range(4):
        checked.check(record("failed", 0.0))
    assert switch.reason is None
    checked.check(record("failed", 0.0))
    assert switch.reason == "5 trials in a row failed: loss is nan (see logs/)"


@pytest.mark.timeout(10)
def test_the_time_limit_throws_the_switch() -> None:
    switch = StopSwitch(limit_seconds=0.01)
    switch.wait()
    assert switch.is_thrown()
    assert switch.reason == "the time limit is reached"
    switch.stop("later reasons do not count")
    assert switch.reason == "the time limit is reached"
