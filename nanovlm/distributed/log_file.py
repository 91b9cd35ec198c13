"""A log that costs the program nothing when it cannot be written."""

import contextlib
import logging
import sys


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
