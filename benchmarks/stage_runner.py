"""Runs stages one after the other, each in processes of its own and within a time box.

A stage is a program that writes its figures as JSON. One that fails, hangs or starts daemons costs
only itself: at the end of its time, or of its program, all processes that it has started are ended.
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

Ending = Literal["fine", "failed", "out of time", "skipped", "running"]

MARK = "NANOVLM_STAGE"
"""A variable in the environment of all processes of a stage; some leave its process group."""
GOODBYE_SECONDS = 3.0
"""For a process to write down where it is."""
FAULT_NOISE = "Extension modules:"
"""How the longest line of Python's fault handler begins."""
NUM_ROUNDS = 3
"""In which the processes of a stage are ended: some start others meanwhile."""
NUM_TAIL_LINES = 60
MAX_SOCKET_FOLDER = 30
"""Characters; Ray adds some 75, and Linux allows 107."""
NUM_LOGS = 30
"""Files of daemons, such as Ray's, of which the end is kept when a stage does not end well."""
MAX_LOG_BYTES = 1_500_000
"""Of a stage's output that are kept."""


@dataclasses.dataclass
class Outcome:
    """What became of a stage."""

    number: int
    name: str
    command: Sequence[str]
    box_seconds: float
    ending: Ending = "running"
    seconds: float = 0.0
    exit_code: int | None = None
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tail: Sequence[str] = ()
    """Of its output, if it did not end well."""


def time_box(shares: Sequence[float], index: int, total: float, spent: float) -> float:
    """Return the seconds that a stage may take.

    It has to end when it and those before it would have used up their shares: so what one leaves
    over goes to those that follow, first to the next.

    Args:
        shares: of all stages, in any unit.
        total: seconds for all of them.
        spent: seconds since the first one began.
    """
    return total * sum(shares[: index + 1]) / sum(shares) - spent


def run_stage(outcome: Outcome, log: Path, workplace: Path, environment: Mapping[str, str]) -> None:
    """Run the command of `outcome` and fill in what became of it.

    Args:
        log: file that its output is appended to.
        workplace: folder for the stage's temporary files, removed at last, and its figures.
        environment: variables besides those of this process.
    """
    figures = workplace / f"{outcome.name}.json"
    folder = Path(tempfile.mkdtemp(prefix="t", dir=workplace))
    mark = uuid.uuid4().hex
    for_sockets = str(folder) if len(str(folder)) <= MAX_SOCKET_FOLDER else "/tmp"
    temporary = {"TMPDIR": str(folder), "RAY_TMPDIR": for_sockets, MARK: mark}
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    started = time.monotonic()
    with log.open("ab") as file:
        begin = file.tell()
        file.write(f"\n===== {outcome.number} {outcome.name}: {outcome.command}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [*outcome.command, "--json", str(figures)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment, **temporary, "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome.exit_code = process.wait(max(0.0, outcome.box_seconds))
            outcome.ending = "failed" if outcome.exit_code else "fine"
        except subprocess.TimeoutExpired:
            outcome.ending = "out of time"
            ask_where_they_are(mark)
        finally:
            end_processes(mark, process)
            outcome.seconds = time.monotonic() - started
    outcome.figures = read_figures(figures)
    if outcome.ending != "fine":
        outcome.tail = tail(log, begin)
        append_logs(folder, log)
    shorten(log, begin)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(mark: str) -> Iterator[psutil.Process]:
    """Yield the processes of a stage that are alive."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.environ().get(MARK) == mark:
                yield process


def ask_where_they_are(mark: str) -> None:
    """Let Python's fault handler write down what each process of a stage is doing, and end it."""
    processes = list(processes_of(mark))
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGABRT)
    psutil.wait_procs(processes, timeout=GOODBYE_SECONDS)


def end_processes(mark: str, process: "subprocess.Popen[bytes]") -> None:
    """End all processes of a stage, also those that are being started meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
        process.wait(GOODBYE_SECONDS)
    for _ in range(NUM_ROUNDS):
        left = list(processes_of(mark))
        for other in left:
            with contextlib.suppress(psutil.Error):
                other.kill()
        if not left:
            return
        psutil.wait_procs(left, timeout=GOODBYE_SECONDS)


def read_figures(path: Path) -> dict[str, Any]:
    """Return what a stage has written, nothing if it did not get that far."""
    if not path.exists():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def tail(path: Path, begin: int = 0) -> list[str]:
    """Return the last lines of a file from `begin` on."""
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - 2**16))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if not line.startswith(FAULT_NOISE)][-NUM_TAIL_LINES:]


def append_logs(folder: Path, log: Path) -> None:
    """Append the ends of the log files that a stage has left in its folder, the latest first."""
    found = [p for p in folder.rglob("*") if p.suffix in (".log", ".err", ".out") and p.is_file()]
    written = sorted(
        (p for p in found if p.stat().st_size), key=lambda p: p.stat().st_mtime, reverse=True
    )
    with log.open("a", encoding="utf-8") as file:
        for path in written[:NUM_LOGS]:
            file.write("\n".join([f"--- {path.relative_to(folder)}", *tail(path), ""]))


def shorten(log: Path, begin: int) -> None:
    """Leave out the middle of what a stage has written from `begin` on, if it is too long."""
    with log.open("r+b") as file:
        file.seek(begin)
        written = file.read()
        if len(written) > MAX_LOG_BYTES:
            part = MAX_LOG_BYTES // 2
            file.seek(begin)
            file.truncate()
            file.write(written[:part] + b"\n[...]\n" + written[-part:])
