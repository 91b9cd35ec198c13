"""This process: how signals end it, output that closes before it does, and the CPUs it may use.

Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a program with exit code 130.
"""

import atexit
import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

EXIT_CODE = 130

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ONE_EVENT_SECONDS = 0.1
"""`timeout` and programs that pass Ctrl-C on send what belongs together twice."""

_SHOW_CURSOR = "\x1b[?25h"

_handled: tuple[signal.Signals, ...] = ()
_is_program = False
_terminals: tuple[int, ...] = ()
"""Which of stdin, stdout and stderr are one; of a terminal that is closed nobody can tell."""
_receivers: list[Callable[[], None]] = []
"""Of the contexts of `in_order`, the innermost last."""
_first_at: float | None = None
"""When the first signal came, by time.monotonic."""


def listen() -> None:
    """Let signals end this program from now on. The main thread calls it, before slow imports."""
    global _is_program, _terminals
    _is_program = True
    _terminals = tuple(descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    _handle()
    atexit.register(_ignore)  # the first one is called last


@contextlib.contextmanager
def in_order(stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call `stop` at the first signal, once or more often and from any thread; the context goes on.

    It is called at once if a context around this one has had its signal. Of contexts in each other
    only the innermost is told.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with contextlib.nullcontext() if _handled or not is_main else _handled_meanwhile():
        _receivers.append(stop)
        try:
            if was_interrupted():
                stop()
            yield
        finally:
            _receivers.remove(stop)


def was_interrupted() -> bool:
    """Return whether a signal came that is to end this program, or the context around the call."""
    return _first_at is not None


def renew() -> None:
    """Set the handlers once more, after a library has replaced them; a call of the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in _handled:
            signal.signal(number, _on_signal)


def _handle() -> None:
    global _handled
    is_kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
    _handled = tuple(n for n in _NUMBERS if not (n is signal.SIGHUP and is_kept))
    renew()


@contextlib.contextmanager
def _handled_meanwhile() -> Iterator[None]:
    global _handled, _first_at
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    _handle()
    try:
        yield
    finally:
        _handled, _first_at = (), None
        for number, handler in before.items():
            if handler is not None:  # not one of Python
                signal.signal(number, handler)


def _ignore() -> None:
    """Let no signal change the exit code: all is done, and Python takes the handlers away."""
    for number in _handled:
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: object) -> None:
    """Python calls it in the main thread, as soon as that gets to it."""
    if not _is_program and _is_repeated(number):
        raise KeyboardInterrupt
    if not _is_program:
        for tell in _receivers[-1:]:
            tell()


def _watch(pipe: int) -> None:
    """Act on the signals of a program, whose numbers Python writes into a pipe."""
    while True:
        number = os.read(pipe, 1)[0]
        if number not in _handled:
            continue
        if number == signal.SIGHUP:
            _leave_terminal()
        receivers = tuple(_receivers)
        if _is_repeated(number) or not receivers:
            _end_at_once()
        receivers[-1]()


def _is_repeated(number: int) -> bool:
    """Take note of a signal; return whether it is a second one, of a person who will not wait.

    A terminal that closes sends several, so SIGHUP is never one.
    """
    global _first_at
    now = time.monotonic()
    if _first_at is None:
        _first_at = now
    return number != signal.SIGHUP and now - _first_at > _ONE_EVENT_SECONDS


def _leave_terminal() -> None:
    """Send to nowhere what would go to a terminal that is no more; writing to that fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _terminals:
        os.dup2(nowhere, descriptor)


def _end_at_once() -> None:
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    text = "\ninterrupted\n"
    if 2 in _terminals:
        text = _SHOW_CURSOR + text
    if select.select([], [2], [], 0)[1]:  # nobody waits for a reader that has stopped
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
    os._exit(EXIT_CODE)


def _descendants(ancestor: int) -> list[int]:
    """Return the processes that this one has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found = [ancestor]
    for pid in found:  # which grows meanwhile
        found += children.get(pid, [])
    return found[1:]


def _processes() -> Iterator[tuple[int, int]]:
    """Yield all processes with their parents."""
    if sys.platform != "linux":
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        yield from (tuple(map(int, line.split())) for line in listed.stdout.splitlines())  # type: ignore[misc]
        return
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            yield int(folder.name), int(state[1])


_ERROR = 2
"""Number of standard error."""


class _EnduringFile(io.FileIO):
    """Writes to an open file until that fails, and then drops what it is given."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failure: OSError | None = None
        self._results: Path | None = None

    def write(self, data: Any, /) -> int:
        if self._failure is None:
            try:
                return super().write(data)
            except OSError as error:  # the reader is gone, the terminal is, the disk is full
                self._failure = error
                self._tell()
        return memoryview(data).nbytes

    def name_results(self, folder: Path) -> None:
        """Have the folder named on standard error when this file fails, or at once if it has."""
        self._results = folder
        if self._failure is not None:
            self._tell()

    def _tell(self) -> None:
        if self._results is None:
            return
        line = (
            f"the output is closed ({self._failure and self._failure.strerror}); the program goes "
            f"on without it, results: {self._results}\n"
        )
        with contextlib.suppress(OSError):  # it may be closed as well
            os.write(_ERROR, line.encode(errors="replace"))


@contextlib.contextmanager
def enduring_streams() -> Iterator[None]:
    """Let no write to `sys.stdout` or `sys.stderr` fail for the sake of who reads it meanwhile.

    Streams that are no files of the system, such as those of a notebook, stay as they are.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _enduring(sys.stdout, 1), _enduring(sys.stderr, _ERROR)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = (
            stream or now for stream, now in zip(before, (sys.stdout, sys.stderr), strict=True)
        )


def name_results(folder: Path) -> None:
    """Have standard error name the folder in a line should standard output close."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _EnduringFile):
        raw.name_results(folder)


def _enduring(stream: TextIO | None, number: int) -> TextIO:
    """Return a stream like `stream`, which Python leaves None if it was closed from the start."""
    if stream is None:
        # Or the next file that the program opens would have the number, and what is printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return open(number, "w", encoding="utf-8", closefd=False)
    try:
        file = _EnduringFile(stream.fileno())
    except (AttributeError, io.UnsupportedOperation):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def usable_cpus() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
