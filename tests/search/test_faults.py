"""Whole searches that something goes wrong with, on real Ray, with trials that pretend to train."""

import errno
import functools
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from nanovlm.cluster.recorder import RunOutcome
from nanovlm.config.space import load_space
from nanovlm.errors import RunFailed
from nanovlm.messages import Job, Report, TrialRecord
from nanovlm.resources import Resources
from nanovlm.results.read import (
    PAUSED_FILE,
    RUNGS_FILE,
    STUDY_FILE,
    TRIALS_FILE,
    FolderReader,
    read_records,
)
from nanovlm.search.plan import SearchPlan
from nanovlm.search.run import run_plan
from nanovlm.training.meter import OnUpdate, ignore
from nanovlm.watch.observer import Observer, RunStart
from tests.full_disk import limit_files
from tests.results.starts import DATA
from tests.search.fake_trials import pretend
from tests.worker_threads import worker_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

SPACE = """
preset: digits
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
sampler: {name: tpe}
budget: {trials: 4}
confirm: {top: 0}
"""


def run(
    folder: Path, observers: Sequence[Observer] = (), run_trial: Any = pretend, **options: Any
) -> RunOutcome:
    path = folder.with_suffix(".yaml")
    path.write_text(SPACE)
    data = {part: {**DATA[part], "folder": part} for part in DATA}
    return run_plan(
        SearchPlan(load_space(path), (100, 300), 900, data),
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
        if record.end is not None:
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
    assert sorted(record.number for record in read_records(outcome.folder)) == [0, 1, 2, 3]
    reason = "FloatingPointError: a matrix that is singular"
    left = "Leaving has failed, and gets no more events: SystemExit: 1 (see logs/driver.log)"
    assert outcome.notes == (
        f"the tpe sampler failed in 3 of 3 suggestions, which were random instead: {reason}",
        left,
    )
    assert noticing.notices == [
        f"the tpe sampler failed, and trial 1 is drawn at random: {reason}; see logs/driver.log",
        left,
    ]
    log = (outcome.folder / "logs" / "driver.log").read_text()
    assert "in trial_changed\n" in log and "a matrix that is singular" in log


@pytest.fixture(autouse=True)
def no_limit() -> Iterator[None]:
    yield
    limit_files(None)


class FullDisk(Observer):
    """Lets no file grow from some moment on, as on a full disk; notes what is whole by then."""

    def __init__(self, moment: str) -> None:
        self.ended: list[TrialRecord] = []
        self._moment = moment
        self._folder = Path()

    def begin(self, start: RunStart) -> None:
        self._folder = start.folder
        self._fill("begin")

    def trial_changed(self, record: TrialRecord) -> None:
        if record.end is not None:
            self._fill("end of a trial")
        elif record.is_paused:
            self._fill("pause")
        elif record.reports:
            self._fill("report")

    def _fill(self, moment: str) -> None:
        if moment == self._moment and not self.ended:
            self.ended = read_records(self._folder)
            path = self._folder / TRIALS_FILE
            limit_files(path.stat().st_size + 20 if path.exists() else 20)


def pretend_where_no_room_is(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    """Have no room for what trial 1 writes."""
    for report in pretend(job, resources, interrupted):
        if job.number == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), job.output_dir)
        yield report


def check_that_it_goes_on(folder: Path, before: Sequence[TrialRecord]) -> None:
    """Check that all files are whole, and that the search comes to its end."""
    assert read_records(folder) == list(before)
    for name in (TRIALS_FILE, PAUSED_FILE, RUNGS_FILE, STUDY_FILE):
        if (folder / name).exists():
            text = (folder / name).read_text()
            assert text == "" or text.endswith("\n"), name
            assert all(json.loads(line) for line in text.splitlines()), name
    outcome = run(folder, resume=True)
    assert outcome.summary["ended_by"] == "budget.trials: 4 trials are done"
    assert sorted(record.number for record in read_records(folder)) == [0, 1, 2, 3]
    assert read_records(folder)[: len(before)] == list(before)


@pytest.mark.parametrize("moment", ["begin", "report", "pause", "end of a trial"])
def test_the_disk_fills(moment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, disk = tmp_path / "search", FullDisk(moment)
    message = (
        r"the disk is full: .*\[Errno 27\] File too large.*\. The run is in .*/search, where .* "
        r"are free, and it may need .* MiB more; what it has recorded is whole\. Make room and go "
        r"on with --resume"
    )
    with pytest.raises(RunFailed, match=message):
        run(folder, [disk])
    limit_files(None)
    said = capfd.readouterr().err
    assert "Logging error" not in said and "Traceback" not in said
    check_that_it_goes_on(folder, disk.ended)


def test_a_worker_has_no_room(tmp_path: Path) -> None:
    """Which is no fault of the trial's: it has not ended, and the search goes on with it."""
    folder = tmp_path / "search"
    place = re.escape(str(folder / "checkpoints" / "trial-0001"))
    with pytest.raises(RunFailed, match=rf"the disk is full: trial-0001: .*28\].*{place}"):
        run(folder, run_trial=pretend_where_no_room_is)
    assert read_records(folder) == []
    assert [*FolderReader(folder).paused(())] == [0], "the one before it waits"
    check_that_it_goes_on(folder, ())
