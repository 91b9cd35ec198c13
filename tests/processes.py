"""Starts programs as a shell does, and finds what is left of them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_ENVIRONMENT = {
    "COLUMNS": "200",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # nobody looks at these clusters: a process less
}
_sessions: set[int] = set()
"""Sessions of the operating system, by their first process; what a program starts stays in it."""


def start_command(*command: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a command in a session of its own, as from a terminal."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **_ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _sessions.add(process.pid)
    return process


def count_session(leader: int) -> None:
    """Count a session, by its first process, to those that tests have started."""
    _sessions.add(leader)


def output_of(process: "subprocess.Popen[str]", timeout: float = 150) -> str:
    """Return what a command says until its end; one that does not end is killed."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def started_processes() -> Iterator[psutil.Process]:
    """Yield what runs in the sessions of the commands that were started, also without them."""
    yield from _running_in(_sessions)


def session_processes(leader: int) -> list[psutil.Process]:
    """Return what runs in the session of this first process, which may have ended."""
    return list(_running_in({leader}))


def _running_in(sessions: set[int]) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and _session(process.pid) in sessions:
            yield process


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
