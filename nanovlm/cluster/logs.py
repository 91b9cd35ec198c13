"""Log files that keep what libraries say off the terminal, and cost nothing on a full disk."""

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovlm.cluster.ray_compat import prints_logged

DRIVER_LOG = "driver.log"

_TALKATIVE = ("ray", "optuna")
"""Loggers of libraries that bring handlers of their own, for the terminal."""


@contextlib.contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Send log records and warnings of this process to `driver.log` in the folder meanwhile.

    Handlers that the program has set for its own use keep what they get.
    """
    handler = LogFile(folder / DRIVER_LOG)
    handler.setFormatter(_FORMAT_OF_THREADS)
    root = logging.getLogger()
    talkative = [logging.getLogger(name) for name in _TALKATIVE]
    before = [(logger.handlers, logger.propagate) for logger in talkative]
    root.addHandler(handler)
    for logger in talkative:
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)
    try:
        with prints_logged(logging.getLogger("ray")):
            yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(talkative, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        root.removeHandler(handler)
        handler.close()


_CLOSE_SECONDS = 10.0

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_FORMAT_OF_THREADS = logging.Formatter(
    "%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"
)
"""Each worker group has a thread in the driver, which bears its name."""


class LogFile(logging.FileHandler):
    """Leaves out the lines for which the disk has no room.

    Python's own handler prints a traceback for each of them, and fails when it is closed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(_FORMAT)

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class LogRelay(logging.Handler):
    """Passes lines on in a thread of its own, so that who logs never waits."""

    def __init__(self, send: Callable[[str], object]) -> None:
        """
        Args:
            send: takes whole lines, and returns when they have arrived. Once it raises, those that
                follow are left out.
        """
        super().__init__()
        self.setFormatter(_FORMAT)
        self._send = send
        self._lines = queue.SimpleQueue[str | None]()
        self._thread = threading.Thread(target=self._pass_on, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(self.format(record))
        except Exception:  # as logging's own handlers do
            self.handleError(record)

    def close(self) -> None:
        """Return when all lines have arrived, after some seconds at the latest."""
        self._lines.put(None)
        self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _pass_on(self) -> None:
        line = self._lines.get()
        while line is not None:
            lines = [line]
            with contextlib.suppress(queue.Empty):
                while (line := self._lines.get_nowait()) is not None:
                    lines.append(line)
            self._send("".join(f"{each}\n" for each in lines))
            line = line and self._lines.get()
