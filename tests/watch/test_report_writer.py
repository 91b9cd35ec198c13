"""The report is written while a search goes on, and never in its way."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.results.read import ENVIRONMENT_FILE
from nanovlm.watch.observer import RunStart
from nanovlm.watch.report.folder import read_search
from nanovlm.watch.report.writer import ReportWriter
from tests.records import make_record, make_update
from tests.results.fake_records import make_results

RECORD = make_record(0)
UPDATE = make_update("trial-0000", 32, step=1)


def start(folder: Path) -> RunStart:
    return RunStart(
        folder=folder, config=TrainConfig(), objective=Objective(), trial_samples=64, data={}
    )


class Writes:
    """Counts the reports that are asked for; each waits until it is let go."""

    def __init__(self, waits: bool = False) -> None:
        self.count = 0
        self.begun = threading.Event()
        self.go_on = threading.Event()
        if not waits:
            self.go_on.set()

    def __call__(self, folder: Path) -> None:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(30)


def test_the_report_of_a_search_is_there_at_its_end(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "search")
    writer = ReportWriter()
    writer.begin(start(folder))
    for record in read_search(folder).records:
        writer.trial_changed(record)
    writer.end({})
    assert writer.problem is None
    assert "More than chance" in (folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((folder / ENVIRONMENT_FILE).read_text())["packages"]["optuna"]


def test_the_run_does_not_wait_and_changes_share_a_report(tmp_path: Path) -> None:
    writes = Writes(waits=True)
    writer = ReportWriter(writes, seconds_between=0)
    writer.begin(start(tmp_path))
    assert writes.begun.wait(30)
    for _ in range(100):
        writer.trial_changed(RECORD)  # while the first report is being written
    assert writes.count == 1
    writes.go_on.set()
    writer.end({})
    assert writes.count == 2, "one for all changes, which is the last one too"


def test_most_of_the_time_is_not_spent_on_reports(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        begun.append(time.monotonic())
        time.sleep(0.1)

    begun: list[float] = []
    writer = ReportWriter(write, seconds_between=0)
    writer.begin(start(tmp_path))
    while len(begun) < 3:
        writer.trial_changed(RECORD)
        time.sleep(0.001)
    writer.end({})
    assert begun[1] - begun[0] >= 0.9 and begun[2] - begun[1] >= 0.9, "ten times what one takes"


def test_the_last_change_is_in_the_last_report(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "seen").write_text((folder / "state").read_text())

    (tmp_path / "state").write_text("begin")
    for number in range(50):
        writer = ReportWriter(write, seconds_between=0)
        writer.begin(start(tmp_path))
        (tmp_path / "state").write_text(f"end {number}")
        writer.end({})
        assert (tmp_path / "seen").read_text() == f"end {number}"


def test_a_long_trial_gives_signs_of_life(tmp_path: Path) -> None:
    writes = Writes()
    writer = ReportWriter(writes, seconds_between=0, sign_of_life_seconds=0.05)
    writer.begin(start(tmp_path))
    until = time.monotonic() + 30
    while writes.count < 3 and time.monotonic() < until:
        writer.progress(UPDATE)
        time.sleep(0.01)
    writer.end({})
    assert writes.count >= 3


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(folder: Path) -> None:
        raise OSError("the disk is full")

    writer = ReportWriter(write, seconds_between=0)
    with caplog.at_level(logging.ERROR):
        writer.begin(start(tmp_path))
        writer.trial_changed(RECORD)
        writer.end({})
    assert writer.problem == "the report could not be written: OSError: the disk is full"
    assert "OSError: the disk is full" in caplog.text


def test_the_end_without_a_beginning_is_nothing(tmp_path: Path) -> None:
    ReportWriter().end({})
    assert list(tmp_path.iterdir()) == []
