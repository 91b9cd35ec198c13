"""Runs the two programs as a user does, on a search that is small enough for tests.

Ray takes most of the time, so one search is run once and looked at by many tests.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.messages import TrialRecord
from nanovlm.results.read import FolderReader, read_records
from tests.processes import output_of, start_command, started_processes, wait_until

REPOSITORY = Path(__file__).parents[2]

SPACE = ("--space", "search_spaces/digits.yaml")
"""The space that ships; of all that it says the tests only change how long it takes."""

SMALL = (
    *("data_cutoff_idx=150", "epochs=1", "lr_mp=1e-3", "lr_backbones=1e-3"),
    *("search.batch_size={choice: [16, 32]}", "scheduler.reduction_factor=3"),
    *("budget.trials=6", "confirm.runs=2"),
)


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

    @property
    def confirmed(self) -> dict[str, TrialRecord]:
        """The confirming runs by their ids."""
        _, confirmed = FolderReader(self.folder).ended()
        return {run.trial_id: run for run in confirmed}


def start_program(
    script: str, *arguments: str, cwd: Path, **environment: str
) -> "subprocess.Popen[str]":
    """Start one of the two programs, as from a terminal."""
    program = (sys.executable, str(REPOSITORY / script))
    return start_command(*program, *arguments, cwd=cwd, **environment)


def finish(process: "subprocess.Popen[str]", folder: Path, timeout: float = 150) -> Finished:
    """Wait for a program that was given a results folder."""
    output = output_of(process, timeout)
    return Finished(process.returncode, output, folder)


def run_program(script: str, *arguments: str, cwd: Path, name: str, **environment: str) -> Finished:
    """Run a program to its end, with its results in `cwd / "results" / name`."""
    process = start_program(script, *arguments, "--name", name, cwd=cwd, **environment)
    return finish(process, cwd / "results" / name)


def ray_processes() -> set[psutil.Process]:
    """Return the processes of Ray that programs of the tests have started."""
    commands = {process: process.info["cmdline"] or [""] for process in started_processes()}
    return {
        process
        for process, command in commands.items()
        if command[0].startswith("ray::") or "/ray/" in " ".join(command).partition(" --")[0]
    }


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the commands of the README can be typed."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "search_spaces").symlink_to(REPOSITORY / "search_spaces")
    digits_benchmark_rows()[0]["image"].save(folder / "digit.png")
    return folder


@pytest.fixture(scope="session")
def search(workplace: Path) -> Finished:
    """Return the small search, run with one trial at a time."""
    arguments = (*SPACE, *SMALL, "--concurrency", "1")
    return finish(
        start_program("run_search.py", *arguments, cwd=workplace), workplace / "results" / "digits"
    )


@pytest.fixture
def no_ray_left() -> Iterator[None]:
    """Check that the programs of a test leave no process of Ray behind."""
    before = ray_processes()
    yield
    assert wait_until(lambda: ray_processes() <= before, seconds=15), ray_processes() - before
