"""What a person sees while a single run trains."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanovlm.files import shown
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.results.read import REPORT_FILE
from nanovlm.results.statistics import describe_accuracy
from nanovlm.results.summary import by_rules
from nanovlm.watch.observer import RunStart
from nanovlm.watch.terminal.console import PLAIN, RunDisplay, can_redraw
from nanovlm.watch.terminal.tables import (
    describe_cluster,
    describe_data,
    describe_speed,
    two_digits,
)


class SingleDisplay(RunDisplay):
    """Shows a line for each report and, on a terminal, a bar below them."""

    def __init__(self, console: Console, is_quiet: bool = False) -> None:
        super().__init__(console)
        self._num_shown = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f} of {task.total:.0f} samples"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not can_redraw(console) or is_quiet,
        )

    def stop(self) -> None:
        self._progress.stop()

    def begin(self, start: RunStart) -> None:
        self._folder = start.folder
        cluster = describe_cluster(start.cluster, start.dashboard_url)
        self._console.print(
            f"{cluster}\nresults: {shown(start.folder)}\n{describe_data(start.data)}", **PLAIN
        )
        self._task = self._progress.add_task("starting", total=start.trial_samples, state="")
        self._progress.start()

    def progress(self, update: ProgressUpdate) -> None:
        parts = [f"loss {update.train_loss:.3g}"]
        if update.samples_per_second:
            parts.append(f"{two_digits(update.samples_per_second)}/s")
            parts.append(f"data {100 * update.data_wait_fraction:.1f} %")
        self._progress.update(
            self._task,
            completed=update.samples_seen,
            description=update.stage,
            state=", ".join(parts),
        )

    def trial_changed(self, record: TrialRecord) -> None:
        super().trial_changed(record)
        if len(record.reports) > self._num_shown:
            self._num_shown = len(record.reports)
            self._console.print(_line(record), **PLAIN)
        if record.state == "failed":
            self._console.print(f"failed: {record.reason}", style="red", **PLAIN)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.stop()
        report = self._folder / REPORT_FILE
        if report.exists():
            self._console.print(f"report: {shown(report)}", **PLAIN)


def _line(record: TrialRecord) -> str:
    """Return a trial's last report in a line."""
    report, speed, metric = record.reports[-1], describe_speed(record), "mmstar_accuracy"
    accuracy = describe_accuracy(report.metrics, metric) + by_rules(record.config, metric)
    return (
        f"{report.samples_seen} samples, step {report.step}: "
        f"train_loss {report.metrics['train_loss']:.4f}, {metric} {accuracy}  "
        f"({report.seconds:.1f} s{speed and f', {speed}'})"
    )
