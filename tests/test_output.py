"""Standard output and error that close early: the program goes on as if somebody read them."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.recorder import Recorder
from nanovlm.config.search_settings import Objective
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.process import enduring_streams, name_results
from nanovlm.results.read import read_records
from nanovlm.results.write import ResultsStore
from nanovlm.watch.terminal.console import make_console
from nanovlm.watch.terminal.search_display import SearchDisplay
from tests.cluster.test_recorder import UPDATE, record
from tests.results.starts import search_start

REPOSITORY = Path(__file__).parents[1]

PROGRAM = """
import sys
from pathlib import Path
from nanovlm import cli
from nanovlm.process import name_results
from nanovlm.watch.terminal.console import make_console

def main():
    {named}
    console = make_console()
    for number in range(3_000):
        console.print(f"line {{number}}")
        sys.stdout.write(f"and {{number}}\\n")
    Path("done").touch()
    return 3

cli.run_program(main)
"""

CLOSED = "the output is closed (Broken pipe); the program goes on without it, results: results/x\n"


@pytest.mark.parametrize(
    ("named", "shell", "said"),
    [
        ("name_results(Path('results/x'))", "{} | head -2", f"line 0\nand 0\n{CLOSED}"),
        ("pass", "{} | head -2", "line 0\nand 0\n"),
        ("name_results(Path('results/x'))", "{} 2>&1 | head -2", "line 0\nand 0\n"),
        ("name_results(Path('results/x'))", "{} >&- 2>&-", ""),
    ],
    ids=["output", "nothing to name", "both", "closed from the start"],
)
def test_a_program_whose_output_closes_ends_with_its_own_code(
    named: str, shell: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(named=named))
    command = "set -o pipefail; " + shell.format(f"{sys.executable} program.py")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == (said, 3)
    assert (tmp_path / "done").exists()


@contextmanager
def standard_output(file: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a file of the system be standard output, as it is for a program."""
    stream = io.TextIOWrapper(io.FileIO(file, "w", closefd=False), write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with enduring_streams():
        yield
    monkeypatch.undo()


def test_a_search_is_recorded_though_nobody_reads_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits"
    reader, writer = os.pipe()
    ended: list[TrialRecord] = [
        record("completed", trial_id=f"trial-{number:04}") for number in range(3)
    ]
    events: list[TrialRecord | ProgressUpdate] = [record("running"), UPDATE, *ended]
    store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
    with standard_output(writer, monkeypatch), store.opened(resume=False):
        name_results(folder)
        with SearchDisplay(make_console()) as display:
            recorder = Recorder(store, search_start(folder), [display])
            recorder.begin(Cluster(None, True, "own Ray cluster"), 1)
            read = os.read(reader, 100_000)
            os.close(reader)
            for event in events:
                recorder.take([event])
            recorder.end("budget.trials")
        assert recorder.notes() == []
    os.close(writer)
    assert read.startswith(b"digits: trials of 900 samples")
    assert read_records(folder) == ended
    said = CLOSED.replace("results/x", str(folder))
    assert capfd.readouterr().err == said


def test_a_full_disk_behind_the_output_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with standard_output(full, monkeypatch):
        sys.stdout.write("lost\n")
        name_results(Path("results/x"))
        sys.stdout.write("lost too\n")
    os.close(full)
    said = CLOSED.replace("Broken pipe", "No space left on device")
    assert capfd.readouterr().err == said


def test_streams_that_are_no_files_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with enduring_streams():
        assert sys.stdout is stream
