"""What Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do: they end a program, with exit code 130.

    interrupts.listen()                      # a program, first of all
    with interrupts.in_order(switch.stop):   # here the first signal is told, and ends nothing
        ...

Outside of `in_order` a signal ends the program at once, with all processes that it has started:
imports, the plan and the preparation of data leave nothing behind that does harm. Inside, a second
one does. A thread acts on signals, so that the main one may be anywhere, in the middle of an import
or of a call into C++. Who uses this package from a program of his own does not call `listen`; then
`in_order` alone has an effect, and a second signal raises KeyboardInterrupt.
"""

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
