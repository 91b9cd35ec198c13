"""When a search ends before its number of trials."""

from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.search_settings import Objective, join
from nanovlm.config.space import load_space
from nanovlm.messages import End, TrialRecord, TrialState
from nanovlm.search.limits import Limits, hours_reason
from tests.records import make_record, make_report, make_speed

LOGS = Path("results/lr/logs")


class Search:
    """Ends trials one after another, as the workers of a search do."""

    def __init__(self, tmp_path: Path, **budget: Any) -> None:
        path = tmp_path / "space.yaml"
        path.write_text("search: {lr_mp: default}\nresources: {workers: 2, gpus_per_worker: 1}")
        space = load_space(path, {f"budget.{key}": value for key, value in budget.items()})
        self.switch = StopSwitch()
        self.limits = Limits(space, self.switch, LOGS)
        self.num_trials = 0

    def end(self, state: TrialState, accuracy: float = 0.0, **more: Any) -> None:
        self.limits.check(record(state, accuracy, number=self.num_trials, **more))
        self.num_trials += 1

    def fail(self, reason: str = "no image left", **more: Any) -> None:
        self.end("failed", reason=reason, reports=(), **more)


def record(
    state: TrialState, accuracy: float, number: int = 0, seconds: float = 900.0, **more: Any
) -> TrialRecord:
    reports = [make_report(1, {"mmstar_accuracy": accuracy}, seconds=seconds)]
    return make_record(number, state, **{"reports": reports} | more)


def test_the_target_counts_for_trials_of_full_length(tmp_path: Path) -> None:
    search = Search(tmp_path, target=0.9)
    search.end("stopped", 0.95)
    search.end("running", 0.95)
    search.end("completed", 0.89)
    assert search.switch.reason is None
    search.end("completed", 0.9)
    expected = "budget.target: trial 3 has mmstar_accuracy 0.9, the target is 0.9"
    assert search.switch.reason == expected


def test_gpu_hours_count_every_gpu_of_a_trial(tmp_path: Path) -> None:
    search = Search(tmp_path, gpu_hours=1.0)
    search.end("stopped", 0.1, seconds=900.0)
    assert search.switch.reason is None
    search.end("completed", 0.1, seconds=990.0)
    assert search.switch.reason == "budget.gpu_hours: 1.05 GPU-hours of 1 are spent"


def test_gpu_hours_count_the_work_on_paused_trials_once(tmp_path: Path) -> None:
    search = Search(tmp_path, gpu_hours=1.0)
    search.limits.check(record("paused", 0.1, number=0, seconds=500.0))
    search.limits.check(record("running", 0.1, number=0, seconds=500.0))
    search.limits.check(record("paused", 0.1, number=0, seconds=900.0))
    search.limits.check(record("stopped", 0.1, number=0, seconds=900.0))
    search.limits.check(record("running", 0.1, number=1, seconds=600.0))
    assert search.switch.reason is None
    search.limits.check(record("paused", 0.1, number=1, seconds=990.0))
    assert search.switch.reason == "budget.gpu_hours: 1.05 GPU-hours of 1 are spent"


def test_gpu_hours_of_an_earlier_run_count_whatever_became_of_them(tmp_path: Path) -> None:
    search = Search(tmp_path, gpu_hours=1.0)
    search.limits.replay([record("failed", 0.1), record("stopped", 0.1, number=1)])
    assert search.switch.reason == "budget.gpu_hours: 1 GPU-hours of 1 are spent"


def test_patience_counts_trials_since_the_best(tmp_path: Path) -> None:
    search = Search(tmp_path, patience=3)
    for _ in range(4):
        search.end("stopped", 0.9)  # there is no best yet
    search.end("completed", 0.5)
    search.end("completed", 0.4)
    search.end("stopped", 0.9)
    search.end("completed", 0.6)
    search.end("completed", 0.6)  # as good is not better
    search.fail()
    search.end("running", 0.1)
    search.end("stopped", 0.1)
    assert search.switch.reason is None
    search.end("stopped", 0.9)
    assert search.switch.reason == (
        "budget.patience: 3 trials of 3 are over without a new best since trial 7 "
        "(mmstar_accuracy 0.6)"
    )


def test_patience_of_an_objective_to_minimise(tmp_path: Path) -> None:
    search = Search(tmp_path, patience=1)
    search.limits._objective = search.limits._objective.model_copy(update={"mode": "min"})
    search.end("completed", 0.5)
    search.end("completed", 0.4)
    assert search.switch.reason is None
    search.end("completed", 0.45)
    assert search.switch.reason is not None


def test_patience_goes_on_after_an_interruption(tmp_path: Path) -> None:
    ended = [
        record("completed", 0.5),
        record("stopped", 0.4, number=1),
        record("stopped", 0.4, number=2, end=End.SEARCH_ENDED),
    ]
    search = Search(tmp_path, patience=2)
    search.limits.replay(ended)
    assert search.switch.reason is None
    search.end("stopped", 0.4)
    assert search.switch.reason is not None


def test_a_trial_that_pauses_counts_once_for_the_patience(tmp_path: Path) -> None:
    search = Search(tmp_path, patience=3)
    search.limits.check(record("completed", 0.5, number=0))
    states: list[TrialState] = ["paused", "running", "paused", "stopped"]
    for state in states:
        search.limits.check(record(state, 0.4, number=1))
    search.limits.check(record("paused", 0.4, number=2))
    assert search.switch.reason is None
    search.limits.check(record("paused", 0.4, number=3))
    assert search.switch.reason is not None and "3 trials of 3 are over" in search.switch.reason


def test_a_row_of_failures_ends_the_search_with_the_common_reason(tmp_path: Path) -> None:
    search = Search(tmp_path)
    for _ in range(4):
        search.fail()
    search.end("completed", 0.5)
    for _ in range(4):
        search.fail()
    assert search.switch.reason is None
    search.fail()
    expected = "5 trials in a row failed: no image left; see results/lr/logs"
    assert search.switch.reason == expected


def test_a_row_of_different_failures_ends_the_search_with_the_last(tmp_path: Path) -> None:
    search = Search(tmp_path)
    for number in range(5):
        search.fail(f"disk {number} is full")
    assert search.switch.reason == (
        "5 trials in a row failed: disk 4 is full (the last one; the others failed otherwise); "
        "see results/lr/logs"
    )


def test_infeasible_trials_end_the_search_only_if_nothing_works(tmp_path: Path) -> None:
    search = Search(tmp_path)
    for _ in range(5):
        search.fail("out of memory", end=End.OUT_OF_MEMORY)
    assert search.switch.reason is not None

    search = Search(tmp_path)
    search.end("running", reports=())  # trial 0 may work
    for _ in range(9):
        search.fail("out of memory", end=End.OUT_OF_MEMORY)
    assert search.switch.reason is None
    search.limits.check(record("running", 0.3))
    search.limits.check(record("stopped", 0.3))
    for _ in range(9):
        search.fail("out of memory", end=End.OUT_OF_MEMORY)
    assert search.switch.reason is None
    for _ in range(5):
        search.fail()
    assert search.switch.reason is not None


@pytest.mark.timeout(10)
def test_the_time_limit_throws_the_switch(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: default}\nbudget: {hours: 2}")
    switch = StopSwitch(0.01, hours_reason(load_space(path).budget))
    switch.wait()
    assert switch.is_thrown()
    assert switch.reason == "budget.hours: 2 hours have passed"
    switch.stop("later reasons do not count")
    assert switch.reason == "budget.hours: 2 hours have passed"


def test_with_several_objectives_who_comes_to_the_front_is_a_new_best(tmp_path: Path) -> None:
    search = Search(tmp_path, patience=2)
    both = [Objective(), Objective.model_validate({"metric": "seconds_per_sample"})]
    search.limits._objective = join(both)

    def end(accuracy: float, seconds: float) -> None:
        speed = make_speed(samples_per_second=1 / seconds)
        report = make_report(1, {"mmstar_accuracy": accuracy}, speed=speed)
        search.end("completed", reports=[report])

    for accuracy, seconds in [(0.9, 0.01), (0.8, 0.02), (0.5, 0.005), (0.95, 0.05), (0.9, 0.01)]:
        end(accuracy, seconds)  # the second one is behind, and the last is on the front as well
    end(0.85, 0.02)
    assert search.switch.reason is None
    end(0.4, 0.006)
    assert search.switch.reason == (
        "budget.patience: 2 trials of 2 are over without a new best since trial 4 "
        "(mmstar_accuracy 0.9)"
    )
