"""What is written and who is told, in which order."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nanovlm.distributed.driver_log import DRIVER_LOG, logged_to
from nanovlm.distributed.recorder import Recorder, RunOutcome
from nanovlm.distributed.session import INTERRUPTED
from nanovlm.messages import Pulse, TrialRecord
from nanovlm.observer import Observer, RunStart
from nanovlm.results.read import read_records
from nanovlm.results.store import ResultsStore
from nanovlm.search.sections import Objective
from tests.records import make_record, make_report
from tests.results.starts import search_start, single_start

METRICS = {"mmstar_accuracy": 0.5, "mmstar_num_items": 1224.0}


def record(state: Any, *, has_report: bool = True, **changes: Any) -> TrialRecord:
    reports = [make_report(9, METRICS, seconds=2.0)] if has_report else []
    return make_record(0, state, **{"config": {"seed": 0}, "reports": reports} | changes)


PULSE = Pulse(
    trial_id="trial-0000",
    stage="training",
    step=1,
    samples_seen=9,
    total_samples=90,
    train_loss=1.0,
    samples_per_second=9.0,
    data_wait_fraction=0.0,
)


class Witness(Observer):
    """Notes what it is told, and what is on disk at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[Any, ...]] = []

    def begin(self, start: RunStart) -> None:
        files = sorted(path.name for path in start.folder.iterdir() if path.is_file())
        self.told.append(("begin", start.num_slots, start.dashboard_url, files))

    def pulse(self, pulse: Pulse) -> None:
        self.told.append(("pulse", pulse.step))

    def trial_changed(self, record: TrialRecord) -> None:
        self.told.append((record.state, len(read_records(self.folder))))

    def end(self, summary: Mapping[str, Any]) -> None:
        on_disk = json.loads((self.folder / "summary.json").read_text())
        self.told.append(("end", summary["ended_by"], on_disk == json.loads(json.dumps(summary))))


def record_run(
    folder: Path, start: RunStart, events: list[TrialRecord | Pulse], ended_by: str
) -> Witness:
    witness = Witness(folder)
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
    with store.opened(resume=False):
        recorder = Recorder(store, start, [witness])
        recorder.begin("http://127.0.0.1:8265", True, 3)
        recorder.begin("http://127.0.0.1:8265", True, 3)  # for the runs that confirm
        for event in events:
            recorder.take(event)
        recorder.end(ended_by)
    return witness


def test_what_has_ended_is_on_disk_when_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    events: list[TrialRecord | Pulse] = [record("running"), PULSE, record("completed")]
    witness = record_run(folder, search_start(folder), events, "budget.trials")
    assert witness.told == [
        ("begin", 3, "http://127.0.0.1:8265", ["data.json", "space.yaml"]),
        ("running", 0),
        ("pulse", 1),
        ("completed", 1),
        ("end", "budget.trials", True),
    ]


def test_an_error_is_told_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    witness = Witness(folder)
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
    with store.opened(resume=False):
        recorder = Recorder(store, search_start(folder), [witness])
        with pytest.raises(RuntimeError), recorder.told_of_errors():
            recorder.begin(None, True, 1)
            raise RuntimeError("all worker groups have ended")
    assert witness.told[-1] == ("end", "an error: all worker groups have ended", True)


@pytest.mark.parametrize("has_report", [False, True])
def test_a_single_run_is_kept_once_it_has_a_report(tmp_path: Path, has_report: bool) -> None:
    folder = tmp_path / "single"
    events: list[TrialRecord | Pulse] = [record("running", has_report=has_report)]
    witness = record_run(folder, single_start(folder), events, INTERRUPTED)
    assert witness.told[-1] == ("end", INTERRUPTED, True)
    assert folder.exists() == has_report
    if has_report:
        assert (folder / "config.yaml").exists()
        assert not (folder / "space.yaml").exists()


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ({"total": 0, "failed": 0}, False),
        ({"total": 2, "failed": 1}, False),
        ({"total": 2, "failed": 2}, True),
    ],
)
def test_a_run_has_failed_if_all_of_it_did(trials: dict[str, int], expected: bool) -> None:
    outcome = RunOutcome(Path(), {"ended_by": "budget.trials", "trials": trials})
    assert outcome.has_failed == expected
    assert not outcome.is_interrupted


def test_what_libraries_say_goes_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging
    import warnings

    import optuna  # noqa: F401  # brings a handler for the terminal
    import ray  # noqa: F401  # so does this

    before = [logging.getLogger(name).handlers for name in ("ray", "optuna")]
    with logged_to(tmp_path):
        for name in ("ray.tune", "optuna.study", "nanovlm.search"):
            logging.getLogger(name).error("chatter of %s", name)
        warnings.warn("a library is old", DeprecationWarning, stacklevel=1)
    assert [logging.getLogger(name).handlers for name in ("ray", "optuna")] == before
    text = (tmp_path / DRIVER_LOG).read_text()
    for what in ("ray.tune", "optuna.study", "nanovlm.search"):
        assert f"ERROR {what}: chatter of {what}" in text
    assert "a library is old" in text
    assert capsys.readouterr().err == ""
