"""Standard output and error that may close before the program does, as in `... | head -2`.

A search goes on for hours after whoever read its first lines has left. So both streams write to
files that never fail: what can no longer be written is dropped, and nobody above has to know.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

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
