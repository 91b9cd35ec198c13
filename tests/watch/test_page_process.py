"""The pages of a large search are written by a process of its own, which never outlives the run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.watch.observer import RunStart
from nanovlm.watch.report.page import write_report
from nanovlm.watch.report.page_process import PageFailed, PageProcess
from nanovlm.watch.report.writer import MANY_SLOTS, MANY_TRIALS, ReportWriter
from tests.processes import wait_until
from tests.records import make_record
from tests.results.fake_records import make_results

TIMES = re.compile(r'"writtenAt":\d+|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("results") / "search")


def children_of(pid: int) -> list[psutil.Process]:
    """Return those that make pages; Ray may have others."""
    children = psutil.Process(pid).children()
    return [child for child in children if "page_process" in " ".join(child.cmdline())]


def child_of(pid: int) -> psutil.Process:
    (child,) = children_of(pid)
    return child


def start_of(folder: Path, concurrency: int) -> RunStart:
    return RunStart(
        folder=folder,
        config=TrainConfig(),
        objective=Objective(),
        trial_samples=64,
        data={},
        concurrency=concurrency,
    )


def test_its_page_is_that_of_this_process(folder: Path) -> None:
    here = write_report(folder).read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    pages = PageProcess()
    pages.write(folder)
    child = child_of(os.getpid())
    assert child.nice() == min(19, psutil.Process().nice() + 10)
    assert os.getpgid(child.pid) != os.getpgrp(), "Ctrl-C reaches the program alone"
    pages.write(folder)
    assert child_of(os.getpid()) == child, "the same one writes the next page"
    pages.close()
    assert not child.is_running()
    there = (folder / "report.html").read_text(encoding="utf-8")
    assert TIMES.sub("", there) == TIMES.sub("", here)


class Pages(PageProcess):
    """Counts the pages that are asked for, and makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, folder: Path) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("slots", "trials", "is_large"),
    [
        (MANY_SLOTS - 1, MANY_TRIALS - 1, False),
        (MANY_SLOTS, 0, True),
        (1, MANY_TRIALS, True),
    ],
)
def test_which_searches_have_a_process(
    tmp_path: Path, slots: int, trials: int, is_large: bool
) -> None:
    written: list[Path] = []
    pages = Pages()
    writer = ReportWriter(written.append, seconds_between=0, pages=pages)
    earlier = tuple(make_record(number) for number in range(trials))
    writer.begin(replace(start_of(tmp_path, slots), records=earlier))
    assert wait_until(lambda: bool(pages.count or written), seconds=30)
    assert (pages.count, len(written)) == ((1, 0) if is_large else (0, 1))
    begun = len(written)
    writer.end({})
    assert len(written) == begun + 1, "the last page is always written here"


def test_what_goes_wrong_is_told(folder: Path, tmp_path: Path) -> None:
    pages = PageProcess()
    (tmp_path / "empty").mkdir()
    with pytest.raises(PageFailed, match=r"^UserError: .*holds no results of a search") as failed:
        pages.write(tmp_path / "empty")
    assert "in write_report" in failed.value.__notes__[0], "for the log"
    child_of(os.getpid()).kill()
    with pytest.raises(PageFailed, match=r"^its process has ended with code -9$"):
        pages.write(folder)
    pages.write(folder)  # by another one
    pages.close()


def test_a_process_that_cannot_start_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    pages = PageProcess()
    with pytest.raises(PageFailed, match=r"ended with code 1: ModuleNotFoundError: No module"):
        pages.write(folder)


def test_a_failure_is_in_the_notes_of_the_run(tmp_path: Path) -> None:
    writer = ReportWriter(lambda folder: None, seconds_between=0)
    writer.begin(start_of(tmp_path, MANY_SLOTS))  # a folder without results
    assert wait_until(lambda: writer.problem is not None, seconds=30)
    assert str(writer.problem).startswith("the report could not be written: UserError: ")
    writer.end({})
    assert writer.problem is None, "the last one was written"


def test_the_end_of_the_run_does_not_wait_for_a_page(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "search", num_trials=1000)
    pages = PageProcess()
    write_report(folder)
    pages.write(folder)
    (folder / "report.html").unlink()
    child = child_of(os.getpid())
    writing = threading.Thread(target=pages.write, args=(folder,))
    writing.start()
    time.sleep(0.1)
    begun_at = time.monotonic()
    pages.interrupt()
    writing.join()
    pages.close()
    assert time.monotonic() - begun_at < 3
    assert not child.is_running()
    assert list(folder.glob("*report.html*")) == list(folder.glob(".*.part")) == []
    pages.write(folder)  # does nothing any more
    assert not children_of(os.getpid())


PROGRAM = """
import sys, threading, time
from pathlib import Path
from nanovlm.watch.report.page_process import PageProcess
pages, folder = PageProcess(), Path(sys.argv[1])
pages.write(folder)
print("written", flush=True)
if sys.argv[2] == "busy":
    pages.write(folder)
time.sleep(100)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_it_ends_with_a_program_that_is_killed(tmp_path: Path, state: str) -> None:
    folder = make_results(tmp_path / "search", num_trials=1000)
    command = [sys.executable, "-c", PROGRAM, str(folder), state]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "written\n"
        child = child_of(program.pid)
        program.send_signal(signal.SIGKILL)
        assert wait_until(lambda: not child.is_running(), seconds=5)
    finally:
        program.communicate()
    assert not list(folder.glob(".*.part"))


def test_what_a_library_prints_is_no_answer(folder: Path) -> None:
    code = (
        "import sys\n"
        "from nanovlm.watch.report import page_process\n"
        "page_process.write_report = lambda folder: print('warning: 1', flush=True)\n"
        "page_process.serve()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write(json.dumps(str(folder)) + "\n")
    program.stdin.flush()
    assert program.stdout.readline() == "null\n"
    assert program.communicate(timeout=30) == ("", "warning: 1\n")
    assert program.returncode == 0
