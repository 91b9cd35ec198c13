"""The console that the programs write to."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any, Self

from rich import progress
from rich.console import Console
from rich.text import Text

from nanovlm.messages import BuildProgress, TrialRecord
from nanovlm.watch.observer import Observer

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


class LiveDisplay(AbstractContextManager["LiveDisplay"]):
    """Something on a terminal that changes; a context, so that nothing of it stays behind."""

    def stop(self) -> None:
        """Take what changes off the terminal; once more does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class RunDisplay(LiveDisplay, Observer):
    """Shows a run, and each note on it once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_notes = set[str]()

    def notice(self, text: str) -> None:
        if text not in self._shown_notes:
            self._shown_notes.add(text)
            self._console.print(f"note: {text}", style="yellow", **PLAIN)

    def trial_changed(self, record: TrialRecord) -> None:
        """Show the notes of a trial's workers."""
        for text in (note for report in record.reports for note in report.notes):
            self.notice(text)


class PreparationDisplay(LiveDisplay):
    """Shows the progress of preparing a data set; nothing for one that is prepared already.

    A terminal gets a bar for each stage; anything else gets a line now and then.
    """

    def __init__(
        self, console: Console, is_quiet: bool = False, seconds_between_lines: float = 10.0
    ) -> None:
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._has_bars = can_redraw(console) and not is_quiet
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            _RateColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not self._has_bars,
        )
        self._tasks: dict[str, progress.TaskID] = {}
        self._last_line = time.monotonic()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, built: BuildProgress) -> None:
        """Show the progress of a stage."""
        name = f"preparing the {built.what}: {built.stage}"
        if built.stage == "waiting":
            name = f"waiting for another program that prepares the {built.what}"
        if name not in self._tasks:
            self._progress.start()
            self._tasks[name] = self._progress.add_task(name, total=built.total)
        self._progress.update(self._tasks[name], completed=built.done)
        is_due = time.monotonic() - self._last_line >= self._seconds_between_lines
        if not self._has_bars and (is_due or built.stage == "waiting"):
            self._last_line = time.monotonic()
            self._console.print(f"{name}, {built.done} of {built.total}", **PLAIN)


class _RateColumn(progress.ProgressColumn):
    """Rows or images a second."""

    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f}/s")
