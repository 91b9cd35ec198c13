"""Log files that keep what libraries say off the terminal, and cost nothing on a full disk."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray._private import worker as ray_driver

DRIVER_LOG = "driver.log"

_TALKATIVE = ("ray", "optuna")
"""Loggers of libraries that bring handlers of their own, for the terminal."""


ray_logger = logging.getLogger("ray")


@contextlib.contextmanager
def logged_to(folder: Path) -> Iterator[None]:
    """Send log records and warnings of this process to `driver.log` in the folder meanwhile.

    Handlers that the program has set for its own use keep what they get.
    """
    handler = LogFile(folder / DRIVER_LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    talkative = [logging.getLogger(name) for name in _TALKATIVE]
    before = [(logger.handlers, logger.propagate) for logger in talkative]
    root.addHandler(handler)
    print_before = ray_driver.print_to_stdstream
    ray_driver.print_to_stdstream = _log_what_ray_prints
    for logger in talkative:
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)
    try:
        yield
    finally:
        ray_driver.print_to_stdstream = print_before
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(talkative, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        root.removeHandler(handler)
        handler.close()


def _log_what_ray_prints(data: Any, ignore_prefix: bool) -> None:
    """Take the place of what prints, past all settings, that a process of the cluster has died."""
    for line in data["lines"]:
        ray_logger.warning("%s: %s", data["pid"], line)


class LogFile(logging.FileHandler):
    """Leaves out the lines for which the disk has no room.

    Python's own handler prints a traceback for each of them, and fails when it is closed.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
