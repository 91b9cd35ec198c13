"""Whole searches that something goes wrong with, on real Ray, with trials that pretend to train."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from nanovlm.distributed.recorder import RunOutcome
from nanovlm.messages import TrialRecord
from nanovlm.observer import Observer
from nanovlm.results.read import read_records
from nanovlm.search.plan import SearchPlan
from nanovlm.search.runner import run_plan
from nanovlm.search.space import load_space
from tests.results.starts import DATA
from tests.search.pretend import pretend
from tests.worker_threads import worker_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

SPACE = """
preset: digits
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
budget: {trials: 4}
confirm: {top: 0}
"""


def run(
    folder: Path, observers: Sequence[Observer] = (), run_trial: Any = pretend, **options: Any
) -> RunOutcome:
    path = folder.with_suffix(".yaml")
    path.write_text(SPACE)
    return run_plan(
        SearchPlan(load_space(path), (100, 300), 900, data=DATA),
        folder,
        observers=observers,
        concurrency=1,
        start_workers=functools.partial(worker_threads, run_trial=run_trial),
        **options,
    )


class Noticing(Observer):
    """Keeps what a person would have been told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


class Leaving(Observer):
    """Leaves at the first trial that has ended, as rich does when its output is closed."""

    def trial_changed(self, record: TrialRecord) -> None:
        if record.state != "running":
            raise SystemExit(1)


def test_a_search_goes_on_and_tells_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an observer, and of a sampler that always fails."""

    def fail(*arguments: Any) -> Any:
        raise FloatingPointError("a matrix that is singular")

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", fail)
    noticing = Noticing()
    outcome = run(tmp_path / "search", [Leaving(), noticing])
    assert outcome.summary["ended_by"] == "budget.trials: 4 trials are done"
    assert [record.number for record in read_records(outcome.folder)] == [0, 1, 2, 3]
    reason = "FloatingPointError: a matrix that is singular"
    left = "Leaving has failed, and was told nothing after: SystemExit: 1 (see logs/driver.log)"
    assert outcome.notes == (
        f"the tpe sampler failed in 3 of 3 suggestions, which were random instead: {reason}",
        left,
    )
    assert noticing.notices == [
        left,
        f"the tpe sampler failed, and trial 1 is drawn at random: {reason}; see logs/driver.log",
    ]
    log = (outcome.folder / "logs" / "driver.log").read_text()
    assert "in trial_changed\n" in log and "a matrix that is singular" in log
