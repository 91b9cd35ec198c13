"""What a worker tells of a trial besides its reports."""

import subprocess
import sys
from dataclasses import replace

import pytest

from nanovlm.cluster import worker
from nanovlm.cluster.worker import seconds_to_first_step
from tests.records import make_report, make_update


@pytest.mark.parametrize(
    ("index", "seconds"),
    [(0, 3.0), (1, 3.0), (2, 0.5), (3, 0.5)],
    ids=["first", "same leg", "made after a pause", "same leg as that"],
)
def test_the_first_step_is_told_from_the_start_of_the_leg(index: int, seconds: float) -> None:
    times = [(3.0, 10.0), (3.0, 20.0), (20.5, 30.0), (20.5, 40.0)]
    reports = [make_report(0, {}, first_step_seconds=first, seconds=end) for first, end in times]
    assert seconds_to_first_step(reports[index], reports[:index]) == seconds


BROKEN_GPU = """
import torch
from nanovlm.cluster.worker import _check_gpu

_check_gpu()
try:
    torch.zeros(1, device="cuda")[torch.ones(1, dtype=torch.long, device="cuda")].item()
except RuntimeError:
    _check_gpu()
"""


@pytest.mark.gpu
def test_a_gpu_that_has_failed_is_noticed() -> None:
    """In a process of its own, which can do nothing with the GPU afterwards."""
    ended = subprocess.run([sys.executable, "-c", BROKEN_GPU], capture_output=True, text=True)
    assert ended.returncode == 1
    *_, last_but_one, _ = [line for line in ended.stderr.splitlines() if line.startswith("  File")]
    assert last_but_one.endswith("in _check_gpu")


def test_updates_are_sent_no_more_often_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.9, 4.0, 4.5, 5.0])
    monkeypatch.setattr("nanovlm.cluster.worker.time.monotonic", lambda: next(clock))
    updates, training = worker._Updates(4.0), make_update("trial-0", 32, step=1)
    assert [updates.is_wanted(training) for _ in range(4)] == [True, False, False, True]
    evaluating = replace(training, stage="evaluating")
    assert updates.is_wanted(evaluating) and updates.is_wanted(training), "each new stage is told"
