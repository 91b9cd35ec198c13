"""How far the preparation of a data set is."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nanovlm.messages import BuildProgress
from nanovlm.results.terminal.console import PLAIN, LiveDisplay, can_redraw


class PreparationDisplay(LiveDisplay):
    """Shows how far the preparation of a data set is. What is there at once stays quiet.

    A terminal gets a bar for each stage; anything else gets a line now and then.
    """

    def __init__(
        self, console: Console, is_quiet: bool = False, seconds_between_lines: float = 10.0
    ) -> None:
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._has_bars = can_redraw(console) and not is_quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._has_bars,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, progress: BuildProgress) -> None:
        """Take in how far it is."""
        name = f"preparing the {progress.what}: {progress.stage}"
        if progress.stage == "waiting":
            name = f"waiting for another program that prepares the {progress.what}"
        if name not in self._tasks:
            self._progress.start()
            self._tasks[name] = self._progress.add_task(name, total=progress.total)
        self._progress.update(self._tasks[name], completed=progress.done)
        is_due = time.monotonic() - self._last_line >= self._seconds_between_lines
        if not self._has_bars and (is_due or progress.stage == "waiting"):
            self._last_line = time.monotonic()
            self._console.print(f"{name}, {progress.done} of {progress.total}", **PLAIN)


class _RateColumn(ProgressColumn):
    """Rows or images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f}/s")
