"""The console that the programs write to."""

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""How to print what others read: as it is, without line breaks."""

_FILE_WIDTH = 200


def make_console() -> Console:
    """Return the console of the programs; a file or a pipe gets lines that are not cut.

    A terminal whose encoding lacks a character gets a question mark for it, and not the end of the
    program.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def can_redraw(console: Console) -> bool:
    """Return whether what was written can be written over."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveDisplay:
    """Something on a terminal that changes; a context, so that nothing of it stays behind."""

    def stop(self) -> None:
        """Take what changes off the terminal; once more does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
