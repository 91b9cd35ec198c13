"""What is written and who is told, in which order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.logs import DRIVER_LOG, logged_to
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.recorder import Recorder, RunOutcome
from nanovlm.cluster.worker_pool import INTERRUPTED
from nanovlm.config.search_settings import Objective
from nanovlm.errors import RunFailed
from nanovlm.messages import Notice, ProgressUpdate, TrialRecord
from nanovlm.results.read import FolderReader, read_records
from nanovlm.results.write import ResultsStore
from nanovlm.watch.observer import Observer, RunStart
from tests.records import make_record, make_report, make_update
from tests.results.starts import search_start, single_start

METRICS = {"mmstar_accuracy": 0.5, "mmstar_num_items": 1224.0}


def record(state: Any, *, has_report: bool = True, **changes: Any) -> TrialRecord:
    reports = [make_report(9, METRICS, seconds=2.0)] if has_report else []
    known = {"config": {"seed": 0}, "reports": reports}
    return make_record(changes.pop("number", 0), state, **known | changes)


UPDATE = make_update("trial-0000", 9, step=1)
NOTICE = Notice(text="group-0 is lost")


class Witness(Observer):
    """Notes what it is told, and what is on disk at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[Any, ...]] = []
        self.found: list[str] = []

    def begin(self, start: RunStart) -> None:
        files = sorted(path.name for path in start.folder.iterdir() if path.is_file())
        self.told.append(("begin", start.concurrency, start.dashboard_url, files))

    def progress(self, update: ProgressUpdate) -> None:
        self.told.append(("progress", update.step))

    def trial_changed(self, record: TrialRecord) -> None:
        paused = FolderReader(self.folder).paused(())
        self.told.append((record.state, len(read_records(self.folder)) + len(paused)))

    def notice(self, text: str) -> None:
        self.told.append(("notice", text))

    def end(self, summary: Mapping[str, Any]) -> None:
        on_disk = json.loads((self.folder / "summary.json").read_text())
        self.told.append(("end", summary["ended_by"], on_disk == json.loads(json.dumps(summary))))


class Failing(Observer):
    """Fails in one of its methods, and notes which ones were called."""

    def __init__(self, where: str, error: BaseException) -> None:
        self._where, self._error = where, error
        self.told: list[str] = []

    def _hear(self, where: str) -> None:
        self.told.append(where)
        if where == self._where:
            raise self._error

    @property
    def notes(self) -> list[str]:
        self._hear("notes")
        return ["all is well"]

    def begin(self, start: RunStart) -> None:
        self._hear("begin")

    def progress(self, update: ProgressUpdate) -> None:
        self._hear("progress")

    def trial_changed(self, record: TrialRecord) -> None:
        self._hear("trial_changed")

    def end(self, summary: Mapping[str, Any]) -> None:
        self._hear("end")


def record_run(
    folder: Path,
    start: RunStart,
    events: Sequence[Event],
    ended_by: str,
    before: tuple[Observer, ...] = (),
) -> Witness:
    """Record a run with a witness, whom `before` are told before; its notes go to the witness."""
    witness = Witness(folder)
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
    with store.opened(resume=False), logged_to(folder / "logs"):
        recorder = Recorder(store, start, [*before, witness])
        recorder.begin(Cluster("http://127.0.0.1:8265", True, "own Ray cluster"), 3)
        recorder.begin(
            Cluster("http://127.0.0.1:8265", True, "own Ray cluster"), 3
        )  # for the runs that confirm
        for event in events:
            recorder.take([event])
        recorder.end(ended_by)
        witness.found = recorder.notes()
    return witness


def test_what_has_ended_is_on_disk_when_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    events: list[Event] = [record("running"), UPDATE, NOTICE, record("completed")]
    events += [record("running", number=1), record("paused", number=1)]
    events.append(record("running", number=1))
    witness = record_run(folder, search_start(folder), events, "budget.trials")
    assert witness.told == [
        ("begin", 3, "http://127.0.0.1:8265", ["data.json", "space.yaml"]),
        ("running", 0),
        ("progress", 1),
        ("notice", "group-0 is lost"),
        ("completed", 1),
        ("running", 1),
        ("paused", 2),
        ("running", 1),
        ("end", "budget.trials", True),
    ]


ORDER = ["begin", "trial_changed", "progress", "trial_changed", "end", "notes"]


@pytest.mark.parametrize("error", [OSError("no such screen"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("where", sorted(set(ORDER)))
def test_an_observer_that_fails_is_left_out_and_all_else_goes_on(
    tmp_path: Path, where: str, error: BaseException
) -> None:
    folder = tmp_path / "digits"
    failing = Failing(where, error)
    events: list[Event] = [record("running"), UPDATE, record("completed")]
    start = search_start(folder)
    undisturbed = record_run(tmp_path / "other", search_start(tmp_path / "other"), events, "over")
    witness = record_run(folder, start, events, "over", (failing,))
    assert [entry for entry in witness.told if entry[0] != "notice"] == undisturbed.told
    assert read_records(folder) == read_records(tmp_path / "other") != []
    assert failing.told == ORDER[: ORDER.index(where) + 1]
    assert witness.found == [
        "Failing has failed, and gets no more events: "
        f"{type(error).__name__}: {error} (see logs/driver.log)"
    ]
    log = (folder / "logs" / DRIVER_LOG).read_text()
    assert "ERROR MainThread nanovlm.cluster.recorder: Failing has failed\nTraceback" in log
    assert f"in {where}\n" in log


def test_ctrl_c_is_no_failure_of_an_observer(tmp_path: Path) -> None:
    failing = Failing("end", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        record_run(tmp_path / "digits", search_start(tmp_path / "digits"), [], "over", (failing,))


class Troubled(Observer):
    """Something goes wrong in a thread of its own after the first update."""

    trouble: str | None = None

    @property
    def problem(self) -> str | None:
        return self.trouble

    def progress(self, update: ProgressUpdate) -> None:
        self.trouble = "the pen is empty"


def test_what_a_person_should_know_is_told_when_it_happens_and_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    events: list[Event] = [Notice(text="all is slow"), UPDATE, UPDATE, record("completed")]
    failing = Failing("trial_changed", OSError("no screen"))
    witness = record_run(folder, search_start(folder), events, "over", (Troubled(), failing))
    notices = [entry for entry in witness.told if entry[0] in ("notice", "progress", "completed")]
    failed = "Failing has failed, and gets no more events: OSError: no screen (see logs/driver.log)"
    assert notices == [
        ("notice", "all is slow"),
        ("progress", 1),
        ("notice", "the pen is empty"),
        ("progress", 1),
        ("completed", 1),
        ("notice", failed),
    ]
    assert witness.found == ["the pen is empty", failed]


def test_an_error_is_told_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    witness = Witness(folder)
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
    with store.opened(resume=False):
        recorder = Recorder(store, search_start(folder), [witness])
        with pytest.raises(RuntimeError), recorder.errors_recorded():
            recorder.begin(Cluster(None, True, "own Ray cluster"), 1)
            raise RuntimeError("all worker groups have ended")
    assert witness.told[-1] == ("end", "an error: all worker groups have ended", True)


def test_a_run_that_has_failed_names_the_folder_that_it_got(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    objective = Objective(metric="mmstar_accuracy", mode="max")
    store = ResultsStore(folder, objective, 0.0, default_name="digits")
    folder.mkdir()  # another program was faster
    with store.opened(resume=False):
        recorder = Recorder(store, search_start(store.folder), [])
        with pytest.raises(RunFailed) as failed, recorder.errors_recorded():
            recorder.begin(Cluster(None, True, "own Ray cluster"), 1)
            raise RunFailed("the disk is full")
    assert failed.value.folder == tmp_path / "digits-2"


@pytest.mark.parametrize("has_report", [False, True])
def test_a_single_run_is_kept_once_it_has_a_report(tmp_path: Path, has_report: bool) -> None:
    folder = tmp_path / "single"
    events: list[Event] = [record("running", has_report=has_report)]
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
        assert f"ERROR MainThread {what}: chatter of {what}" in text
    assert "a library is old" in text
    assert capsys.readouterr().err == ""


def test_a_log_on_a_full_disk_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    (tmp_path / DRIVER_LOG).symlink_to("/dev/full")
    with logged_to(tmp_path):
        for _ in range(3):
            logging.getLogger("ray.tune").error("chatter " * 2000)
    assert capsys.readouterr().err == ""
