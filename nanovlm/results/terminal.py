"""What a person sees while a search runs, and at its end.

A terminal gets a line for each ended trial and one live line below them; anything else (a file, a
pipe) gets the lines alone.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nanovlm.messages import BuildProgress, TrialRecord
from nanovlm.results.summary import Objective, best_record, describe_accuracy

MAX_ROWS = 20
"""Trials in the final table."""

_FILE_WIDTH = 200

_COLORS = {"completed": "green", "stopped": "yellow", "failed": "red", "running": "blue"}


class _Display:
    """A context, so that its live line never stays behind."""

    _progress: Progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class NotesDisplay:
    """Shows what trials did otherwise than configured, each text once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = set[str]()

    def update(self, record: TrialRecord) -> None:
        """Take in a change of a trial."""
        # A results folder of an earlier version has reports without notes.
        for text in (note for report in record.reports for note in report.get("notes", ())):
            if text not in self._shown:
                self._shown.add(text)
                self._console.print(
                    f"note: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True
                )


class SearchDisplay(_Display):
    """Shows the progress of a search."""

    def __init__(
        self,
        console: Console,
        objective: Objective,
        num_trials: int | None,
        earlier: Sequence[TrialRecord] = (),
    ) -> None:
        self._console = console
        self._objective = objective
        self._ended = list(earlier)
        self._running: dict[str, TrialRecord] = {}
        self._confirming: dict[str, TrialRecord] = {}
        self._notes = NotesDisplay(console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("trials"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "starting workers", total=num_trials, completed=len(self._ended)
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return super().__enter__()

    def update(self, record: TrialRecord) -> None:
        """Take in a change of a trial."""
        self._notes.update(record)
        if record.state == "running":
            self._running[record.trial_id] = record
        else:
            self._running.pop(record.trial_id, None)
            self._ended.append(record)
            self._console.print(self._line(record), highlight=False, soft_wrap=True)
        self._progress.update(
            self._task, completed=len(self._ended), description=self._description()
        )

    def update_confirmed(self, record: TrialRecord) -> None:
        """Take in a change of a run that confirms."""
        self._notes.update(record)
        numbers = self._confirming
        if record.state == "running":
            numbers[record.trial_id] = record
        else:
            numbers.pop(record.trial_id, None)
            seed = f"  seed {record.config['seed']}"
            self._console.print(
                self._line(record, "confirm") + seed, highlight=False, soft_wrap=True
            )
        shown = ", ".join(f"{r.number} on seed {r.config['seed']}" for r in numbers.values())
        self._progress.update(self._task, description=escape(f"confirming: {shown or '-'}"))

    def _line(self, record: TrialRecord, what: str = "trial") -> str:
        metric, color = self._objective.metric, _COLORS[record.state]
        score = describe_accuracy(record.metrics, metric) if metric in record.metrics else "-"
        seconds = f"{record.reports[-1]['seconds']:.0f} s" if record.reports else ""
        parts = [
            f"{what} {record.number:<3} [{color}]{record.state:<9}[/{color}]",
            escape(f"{score:<22}"),
            escape(format_parameters(record.parameters)),
            seconds,
            describe_speed(record),
            escape(f"({record.reason})") if record.reason else "",
        ]
        return "  ".join(part for part in parts if part)

    def _description(self) -> str:
        metric = self._objective.metric
        best = best_record(self._ended, self._objective)
        found = f"best {describe_accuracy(best.metrics, metric)}" if best else "no full trial yet"
        numbers = ", ".join(str(record.number) for record in self._running.values())
        return escape(f"{found}; running: {numbers or '-'}")


class PreparationDisplay(_Display):
    """Shows how far the preparation of a data set is. What is there at once stays quiet.

    A terminal gets a bar for each stage; anything else gets a line now and then.
    """

    def __init__(self, console: Console, seconds_between_lines: float = 10.0) -> None:
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

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
        if not self._console.is_terminal and (is_due or progress.stage == "waiting"):
            self._last_line = time.monotonic()
            self._console.print(
                f"{name}, {progress.done} of {progress.total}", highlight=False, soft_wrap=True
            )


class _RateColumn(ProgressColumn):
    """Rows or images a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f}/s")


def describe_data(data: Mapping[str, Any]) -> str:
    """Return in a line what the content of `data.json` comes to, and what was left out."""
    training = data["training"]
    subsets = training["subsets"]
    over_long = sum(subset["over_long_turns"] for subset in subsets.values())
    incomplete = sum(subset["incomplete_turns"] for subset in subsets.values())
    empty = [name for name, subset in subsets.items() if subset["rows"] and not subset["samples"]]
    counts = {
        "over-long turns": over_long,
        "incomplete turns": incomplete,
        "unreadable images": len(training["unreadable_images"]),
    }
    left_out = [f"{number} {what}" for what, number in counts.items() if number]
    left_out += [f"all of {name}" for name in empty]
    line = (
        f"data: {training['samples']} samples of {training['rows']} rows, "
        f"{data['benchmark']['samples']} questions"
    )
    return f"{line}; left out: {', '.join(left_out)} (data.json)" if left_out else line


def describe_speed(record: TrialRecord) -> str:
    """Return the speed at the last report, such as `812 samples/s, data 0.4 %, MFU 41 %`.

    Nothing for a trial without one: it has not reported, or an earlier version wrote it down.
    """
    speed = record.reports[-1].get("speed") if record.reports else None
    if speed is None:
        return ""
    utilization = speed["model_flops_utilization"]
    parts = [
        f"{_two_digits(speed['samples_per_second'])} samples/s",
        f"data {100 * speed['data_wait_fraction']:.1f} %",
    ]
    if utilization is not None:
        parts.append(f"MFU {_two_digits(100 * utilization)} %")
    return ", ".join(parts)


def _two_digits(value: float) -> str:
    """Return `812`, `41` or `8.3`: two digits that count, and all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def make_console() -> Console:
    """Return the console of the programs; a file or a pipe gets lines that are not cut."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def results_table(records: Sequence[TrialRecord], objective: Objective) -> Table:
    """Return the trials as a table, the best first; a shorter trial never before a full one."""
    sign = -1 if objective.mode == "max" else 1
    order = {"completed": 0, "stopped": 1, "failed": 2}

    def rank(record: TrialRecord) -> tuple[int, int, float]:
        value = record.metrics.get(objective.metric, math.inf)
        length = 0 if record.state == "completed" else record.samples_seen
        return order[record.state], -length, sign * value

    shown = sorted(records, key=rank)[:MAX_ROWS]
    keys = sorted({key for record in records for key in record.parameters})
    table = Table(title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in ("trial", "state", "samples", objective.metric, *keys):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for record in shown:
        has_score = objective.metric in record.metrics
        table.add_row(
            str(record.number),
            f"[{_COLORS[record.state]}]{record.state}[/]",
            str(record.samples_seen),
            escape(describe_accuracy(record.metrics, objective.metric) if has_score else "-"),
            *(escape(format_value(record.parameters.get(key, "-"))) for key in keys),
        )
    return table


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """Return `lr_mp=0.0021 batch_size=64`."""
    return " ".join(f"{key}={format_value(value)}" for key, value in parameters.items())


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
