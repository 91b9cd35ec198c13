"""Log files that keep what libraries say off the terminal, and cost nothing on a full disk."""

import contextlib
import logging
import sys
from collections.abc import Iterator
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


class LogFile(logging.FileHandler):
    """Leaves out the lines for which the disk has no room.

    Python's own handler prints a traceback for each of them, and fails when it is closed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
