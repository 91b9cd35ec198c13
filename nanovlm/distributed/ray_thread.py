"""A thread in which Ray starts and ends, so that signals reach this program and nobody else.

- In the main thread Ray takes SIGTERM for itself, and wherever it starts and ends, its C++ part
  does so for a moment: there this program's handlers are set again and again meanwhile.
- Ray's processes leave the process group, which gets the signals of a terminal (Ctrl-C, and SIGHUP
  when it is closed) and of `timeout`: they are there until the program has ended in order.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

from nanovlm import interrupts

T = TypeVar("T")

_SECONDS_BETWEEN_RENEWALS = 0.005

_here = threading.local()


class RayThread:
    """The thread. It lives as long as the context: Linux ends processes of Ray with the thread that
    has started them."""

    def __init__(self) -> None:
        _leave_group_at_fork()
        self._pool = ThreadPoolExecutor(1, "ray", _mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def run(self, do: Callable[[], T]) -> T:
        """Return what `do` returns; the program's handlers of signals are there afterwards."""
        future = self._pool.submit(do)
        while wait([future], _SECONDS_BETWEEN_RENEWALS).not_done:
            interrupts.renew()
        interrupts.renew()
        return future.result()


def _mark() -> None:
    _here.starts_ray = True


@functools.cache
def _leave_group_at_fork() -> None:
    """Let what the thread starts leave the process group; once for this process, for good."""

    def leave() -> None:  # in the new process, before it becomes the other program
        if getattr(_here, "starts_ray", False):
            os.setpgid(0, 0)

    os.register_at_fork(after_in_child=leave)
