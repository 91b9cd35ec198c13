"""The pipe to Syne Tune's schedulers, with a ten-line scheduler in the place of Syne Tune."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay_clock import simulate
from benchmarks.replay_table import CurveTable
from benchmarks.syne_tune_client import SyneTune
from nanovlm.config.parameter import Parameter

BASELINES = """
from types import SimpleNamespace
print("what Syne Tune prints is no answer")
class ASHA:
    rung_levels, max_resource_level = [1, 2], 4
    def __init__(self, space, **options):
        assert options["mode"] == "max" and options["type"] == "promotion", options
        self.space, self.removed = space, []
    def suggest(self, trial_id):
        resumed = {1: 0}.get(len(self.removed)) if trial_id == 1 else None
        return SimpleNamespace(spawn_new_trial_id=resumed is None, checkpoint_trial_id=resumed,
                               config={"x": self.space["x"][1], "epochs": 1})
    def on_trial_add(self, trial): assert trial.config["epochs"] == 1
    def on_trial_result(self, trial, result):
        if result["epoch"] == 2: return "CONTINUE"
        if result["accuracy"] > 0.9: raise ValueError("too good")
        return "PAUSE"
    def on_trial_remove(self, trial): self.removed.append(trial.trial_id)
MOBSTER = ASHA
"""
SETUP = {
    "method": "asha",
    "seed": 1,
    "space": {"x": {"kind": "uniform", "values": [0.0, 0.8]}},
    "max_epochs": 4,
    "grace_period": 1,
}
KEY = Parameter(key="x", kind="uniform", values=(0.0, 1.0), when={})


def curves(first: float) -> CurveTable:
    values = np.array([[0.1] * 4, [first, 0.5, 0.6, 0.7]])
    seen = np.array([[1, 2, 3, 4]] * 2)
    return CurveTable((KEY,), np.array([[0.0], [1.0]]), seen, values)


@pytest.fixture
def fake_syne_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = "\n".join(
        f"{name} = lambda low, high: (low, high)"
        for name in ("uniform", "loguniform", "randint", "lograndint")
    )
    trial = "class Trial:\n    def __init__(self, **given): self.__dict__ |= given\n"
    files = {"optimizer/baselines": BASELINES, "config_space": kinds, "backend/trial_status": trial}
    for name, text in files.items():
        path = tmp_path / "syne_tune" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield
    assert "syne_tune" not in sys.modules


def test_trials_pause_and_go_on_over_the_pipe(fake_syne_tune: None, tmp_path: Path) -> None:
    table = curves(first=0.4)
    with SyneTune(table, Path(sys.executable), tmp_path / "log", SETUP) as method:
        trace = simulate(table, method, 1, limit=6)
    # Trial 0 pauses after an epoch, goes on over the second to the end, and then others come.
    seen = [(report.time, report.column, report.value) for report in trace.reports]
    assert seen == [(1, 0, 0.4), (2, 1, 0.5), (4, 3, 0.7), (5, 0, 0.4), (6, 0, 0.4)]
    assert trace.num_full == 1


def test_an_error_of_the_other_end_is_shown(fake_syne_tune: None, tmp_path: Path) -> None:
    table = curves(first=0.95)
    method = SyneTune(table, Path(sys.executable), tmp_path / "log", SETUP)
    with method, pytest.raises(RuntimeError, match="ValueError: too good"):
        simulate(table, method, 1, limit=6)
