"""This process: how signals end it, what happens if its output closes, which CPUs it may use, and
what its garbage collector looks at.

Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a program with exit code 130.
"""

import atexit
import contextlib
import gc
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

EXIT_CODE = 130

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ONE_EVENT_SECONDS = 0.1
"""Signals that follow each other within this time are one: `timeout` and programs that pass Ctrl-C
on send it twice."""

_SHOW_CURSOR = "\x1b[?25h"

_handled: tuple[signal.Signals, ...] = ()
_is_program = False
_terminals: tuple[int, ...] = ()
"""Which of stdin, stdout and stderr are one; once it is closed this cannot be found out."""
_receivers: list[Callable[[], None]] = []
"""`stop` of the contexts of `in_order`, the innermost last."""
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
    """Call `stop` at a signal, perhaps repeatedly and from any thread; the context goes on.

    If an outer context has had its signal, `stop` is called immediately. Of nested contexts only
    the innermost is called.
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
        for stop in _receivers[-1:]:
            stop()


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
    """Record a signal; return whether it is a second one, by which the user demands an end now.

    A terminal that closes sends several, so SIGHUP never is.
    """
    global _first_at
    now = time.monotonic()
    if _first_at is None:
        _first_at = now
    return number != signal.SIGHUP and now - _first_at > _ONE_EVENT_SECONDS


def _leave_terminal() -> None:
    """Redirect to /dev/null what would go to a terminal that is closed; writing there fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _terminals:
        os.dup2(nowhere, descriptor)


def _end_at_once() -> None:
    _kill_children()
    text = "\ninterrupted\n"
    if 2 in _terminals:
        text = _SHOW_CURSOR + text
    if select.select([], [2], [], 0)[1]:  # else its reader has stopped, and writing would block
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
    os._exit(EXIT_CODE)


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


_LAST_WORDS_SECONDS = 120
_last_words: list[Callable[[Exception], object]] = []
"""What the contexts of `on_abandon` have given, the innermost last."""


@contextlib.contextmanager
def on_abandon(say: Callable[[Exception], object]) -> Iterator[None]:
    """Have `abandon` call `say` with its error while the context lasts."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def abandon(error: Exception) -> None:
    """End this program for the error although its main thread waits for what never comes.

    What `on_abandon` has registered is called, the innermost first, then the program exits with
    code 1. Within another program, such as a notebook, this returns then.
    """

    def speak() -> None:
        for say in reversed(_last_words):
            say(error)

    speaking = threading.Thread(target=speak, name="last words", daemon=True)
    speaking.start()
    speaking.join(_LAST_WORDS_SECONDS)
    if _is_program:
        _kill_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_ERROR = 2
"""Number of standard error."""


class _EnduringFile(io.FileIO):
    """Writes to an open file until that fails, and then drops what it is given."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failure: OSError | None = None
        self._results: Path | str | None = None

    def write(self, data: Any, /) -> int:
        if self._failure is None:
            try:
                return super().write(data)
            except OSError as error:  # the reader is gone, the terminal is, the disk is full
                self._failure = error
                self._show_results()
        return memoryview(data).nbytes

    def name_results(self, folder: Path | str) -> None:
        """Name the folder on standard error when this file fails, or now if it has failed."""
        self._results = folder
        if self._failure is not None:
            self._show_results()

    def _show_results(self) -> None:
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
    """Let no write to `sys.stdout` or `sys.stderr` fail because its reader is gone.

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


def name_results(folder: Path | str) -> None:
    """Name the folder in a line on standard error if standard output closes."""
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
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def collecting_new_objects() -> Iterator[None]:
    """Have the garbage collector look at those objects alone that are made meanwhile.

    What the imports have made, half a million objects, lives as long as the program. Each time that
    the collector looks at all of it no thread goes on for 0.15 to 0.4 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
