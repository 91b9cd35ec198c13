"""Runs the two programs as a user does, on a search that is small enough for tests.

Ray takes most of the time, so one search is run once and looked at by many tests.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nanovlm.messages import TrialRecord
from nanovlm.results.store import read_records

REPOSITORY = Path(__file__).parents[2]

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1, lr_mp: 1.0e-3, lr_backbones: 1.0e-3}
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  lr_backbones: {log_uniform: [1.0e-4, 1.0e-1]}
  batch_size: {choice: [16, 32]}
scheduler: {rungs: 3, reduction_factor: 3}
budget: {trials: 6}
confirm: {top: 1, seeds: 1}
resources: {workers: 1, cpus_per_worker: 1}
"""


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    code: int
    output: str
    folder: Path
    """The results folder that it was given."""

    @property
    def records(self) -> list[TrialRecord]:
        return read_records(self.folder)


def start_program(
    script: str, *arguments: str, cwd: Path, **environment: str
) -> "subprocess.Popen[str]":
    """Start a program in a session of its own, as from a terminal."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / script), *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", folder: Path, timeout: float = 150) -> Finished:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, output, folder)


def run_program(script: str, *arguments: str, cwd: Path, name: str = "demo") -> Finished:
    """Run a program to its end, with its results in `cwd / "results" / name`."""
    process = start_program(script, *arguments, "--name", name, cwd=cwd)
    return finish(process, cwd / "results" / name)


def ray_processes() -> set[psutil.Process]:
    """Return the processes of Ray on this machine."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        is_ray = command.startswith("ray::") or "/ray/" in command.partition(" --")[0]
        if is_ray and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the small search's space file, `space.yaml`."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "space.yaml").write_text(SPACE)
    return folder


@pytest.fixture(scope="session")
def search(workplace: Path) -> Finished:
    """Return the small search, run with one trial at a time."""
    arguments = ("--space", "space.yaml", "--concurrency", "1")
    return run_program("run_search.py", *arguments, cwd=workplace)


@pytest.fixture
def no_ray_left() -> Iterator[None]:
    """Check that a test leaves no process of Ray behind that was not there before."""
    before = ray_processes()
    yield
    assert wait_until(lambda: ray_processes() <= before, seconds=15), ray_processes() - before
