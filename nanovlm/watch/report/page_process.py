"""Writes report pages in a process of its own, which leaves the interpreter of the run alone.

    pages = PageProcess()
    pages.write(Path("results/digits"))       # the first one starts the process, which waits then

While a page is made in a thread of the run, every other thread gets half of the interpreter, in
turns of 5 ms. The process has a lower priority, reads what it shows from the results folder, and
ends with the program that started it, however that ends: its input is closed then.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import IO, Any

from nanovlm.watch.report.page import write_report

_NICENESS = 10
"""Added to that of the run: a page that comes later costs nobody anything."""

_SECONDS_TO_END = 5.0
"""After which a process that was told to end is killed."""

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nanovlm.watch.report.page_process import serve; serve()"
)


class PageFailed(Exception):
    """A page could not be written; says why, with the kind of the error."""


class PageProcess:
    """The process; one thread asks it for one page after another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[bytes] | None = None  # what it has written to standard error
        self._is_over = False
        self._lock = threading.Lock()  # `interrupt` is called from other threads

    def write(self, folder: Path) -> None:
        """Write the report of a results folder, as `write_report` does; return when it is there, or
        after `interrupt`.

        Raises:
            PageFailed: it could not be written, or the process has ended. The next call starts
                another one.
            OSError: the process could not be started.
        """
        with self._lock:
            if self._is_over:
                return
            process = self._process = self._process or self._start()
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(str(folder)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            reason = self._end()
            if not self._is_over:
                raise PageFailed(f"its process has ended with {reason}")
        elif (failure := json.loads(answer)) is not None:
            error = PageFailed(failure["error"])
            error.add_note(failure["traceback"])
            raise error

    def interrupt(self) -> None:
        """End the process, also in the middle of a page; none is written after."""
        with self._lock:
            self._is_over = True
            if self._process is not None:
                self._process.terminate()

    def close(self) -> None:
        """Return when the process has ended; a call of the thread that asks it for pages."""
        self.interrupt()
        if self._process is not None:
            self._end()

    def _start(self) -> "subprocess.Popen[str]":
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # `_end` closes it
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            process_group=0,  # so that Ctrl-C reaches the program alone, which ends it
        )

    def _end(self) -> str:
        """End the process and return with what: its exit code, and the last that it has said."""
        process, said = self._process, self._said
        assert process is not None and said is not None
        with process, said:  # waits for it, and closes its files
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
            self._process = None
            code = process.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        return ": ".join([f"code {code}", *lines[-1:]])


# ---------------------------------------------------------------------- in the process


def serve() -> None:
    """Write the reports of the folders on standard input until it is closed."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, _leave)  # a file that is half written is removed then
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    folders = _Folders()
    with contextlib.suppress(SystemExit):
        while True:
            answers.write(json.dumps(_try_to_write(folders.next())) + "\n")
            answers.flush()
    os._exit(0)  # at an orderly exit Python would want the input, which a thread reads


class _Folders:
    """The folders that are asked for. A thread reads them, so that the end of the program is seen
    in the middle of a page too."""

    def __init__(self) -> None:
        self._folder = Path()
        self._is_there = threading.Semaphore(0)
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Path:
        self._is_there.acquire()
        return self._folder

    def _read(self) -> None:
        for line in sys.stdin:  # the next one comes after the answer
            self._folder = Path(json.loads(line))
            self._is_there.release()
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, frame: object) -> None:
    raise SystemExit


def _try_to_write(folder: Path) -> dict[str, Any] | None:
    """Write a report; return what has gone wrong, None if nothing has."""
    try:
        write_report(folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"error": text, "traceback": traceback.format_exc()}
    return None
