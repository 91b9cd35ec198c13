"""What a person sees while a search runs, and at its end.

A terminal gets a line for each trial that pauses or ends and, below them, a table of the running
ones with a bar for the budget. Anything else (a file, a pipe, `--quiet`) gets the lines alone.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from nanovlm.config.sources import config_values
from nanovlm.messages import End, ProgressUpdate, TrialRecord
from nanovlm.results.statistics import describe_accuracy
from nanovlm.results.summary import best_record, by_rules, training_seconds
from nanovlm.watch.observer import Observer, RunStart
from nanovlm.watch.terminal.console import PLAIN, LiveDisplay, NotesDisplay, can_redraw
from nanovlm.watch.terminal.live_table import (
    RunningTrial,
    Spent,
    budget_bar,
    describe_budget,
    nearest_limit,
    running_table,
)
from nanovlm.watch.terminal.tables import (
    COLORS,
    describe_cluster,
    describe_data,
    describe_places,
    describe_speed,
    format_parameters,
    show_results,
)

_REFRESHES_PER_SECOND = 4
_LINES_BESIDE_ROWS = 6
"""Of the live part: head of the table, best, bar, and space for a line above."""


class SearchDisplay(LiveDisplay, Observer):
    """Shows a search."""

    def __init__(self, console: Console, is_quiet: bool = False) -> None:
        self._console = console
        self._notes = NotesDisplay(console)
        self._lock = threading.Lock()  # what is shown is read by the thread that redraws
        self._running: dict[str, RunningTrial] = {}
        self._paused: dict[str, TrialRecord] = {}
        self._ended: list[TrialRecord] = []
        self._confirmed: list[TrialRecord] = []
        self._start: RunStart | None = None
        self._began_at = 0.0
        self._live: Live | None = None
        self._is_live = can_redraw(console) and not is_quiet

    def begin(self, start: RunStart) -> None:
        self._start = start
        self._objective = start.objective
        self._ended, self._confirmed = list(start.records), list(start.confirmed)
        self._began_at = time.monotonic() - start.earlier_seconds
        self._console.print(_header(start), **PLAIN)
        if self._is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def notice(self, text: str) -> None:
        self._notes.show(text)

    def progress(self, update: ProgressUpdate) -> None:
        with self._lock:
            trial = self._running.get(update.trial_id)
            if trial is not None:
                self._running[update.trial_id] = RunningTrial(trial.record, update)

    def trial_changed(self, record: TrialRecord) -> None:
        self._notes.update(record)
        with self._lock:
            before = self._running.pop(record.trial_id, None)
            self._paused.pop(record.trial_id, None)
            if record.is_paused:
                self._paused[record.trial_id] = record
            elif record.end is None:
                update = None if before is None else before.update
                self._running[record.trial_id] = RunningTrial(record, update)
            else:
                (self._confirmed if record.confirms else self._ended).append(record)
        has_paused = record.is_paused and before is not None  # else it paused in an earlier run
        if has_paused or record.end is not None:
            self._show_line(record)

    def _show_line(self, record: TrialRecord) -> None:
        if self._live is not None:  # what does not fit in a line is in the report
            self._console.print(self._line(record), no_wrap=True, overflow="ellipsis", crop=True)
        else:
            self._console.print(self._line(record), soft_wrap=True)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.stop()
        assert self._start is not None, "what ends has begun"
        folder, ended, confirmed = self._start.folder, self._ended, self._confirmed
        left = "; ".join(self._left_behind())
        show_results(self._console, folder, self._objective, ended, confirmed, summary, left)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, record: TrialRecord) -> Text:
        metric, color = self._objective.metric, COLORS[record.state]
        score = describe_accuracy(record.metrics, metric) if metric in record.metrics else "-"
        what = "confirm" if record.confirms else "trial"
        parts = [
            f"{what} {record.number:<3} [{color}]{record.state:<9}[/{color}]",
            escape(f"{score:<22}"),
            escape(format_parameters(record.parameters)),
            f"{record.reports[-1].seconds:.0f} s" if record.reports else "",
            describe_speed(record),
            escape(f"({record.reason})") if record.reason else "",
            f"seed {record.config['seed']}" if record.confirms else "",
        ]
        return Text.from_markup("  ".join(part for part in parts if part))

    def _render(self) -> RenderableType:
        """Return the live part; called by the thread that redraws."""
        if self._start is None:
            return Text()
        with self._lock:
            open_trials = sorted(
                self._running.values(), key=lambda trial: trial.record.submitted_at
            )
            counts = self._counts()
            spent = self._confirming(open_trials) or self._spent()
        running = [trial for trial in open_trials if trial.record.worker_group is not None]
        max_rows = max(1, self._console.height - _LINES_BESIDE_ROWS)
        return Group(
            running_table(running, self._objective.metric, self._start.milestones, max_rows),
            counts,
            budget_bar(spent, f"{len(self._ended)} trials", time.monotonic() - self._began_at),
        )

    def _counts(self) -> Text:
        best = best_record(self._ended, self._objective)
        states = [str(record.state) for record in self._ended]
        text = Text("no trial has run in full yet")
        if best is not None:
            score = describe_accuracy(best.metrics, self._objective.metric)
            text = Text.assemble("best: ", (score, "bold green"), f" trial {best.number}")
        for state, name in (("completed", "in full"), ("stopped", "stopped"), ("failed", "failed")):
            text.append("   ")
            text.append(f"{states.count(state)} {name}", style=COLORS[state])
        for waits in self._at_milestones("paused", [*self._paused.values()]):
            text.append(f"   {waits}", style=COLORS["paused"])
        return text

    def _left_behind(self) -> Iterator[str]:
        """Yield how many trials never went on from which milestone, and how many still wait."""
        pruned = [record for record in self._ended if record.end is End.PRUNED]
        yield from self._at_milestones("never went on", pruned)
        yield from self._at_milestones("paused", [*self._paused.values()])

    def _at_milestones(self, what: str, records: Sequence[TrialRecord]) -> Iterator[str]:
        assert self._start is not None, "a search has begun"
        if records:
            yield f"{len(records)} {what} ({describe_places(records, self._start.milestones)})"

    def _spent(self) -> Spent | None:
        assert self._start is not None and self._start.space is not None, "a search has begun"
        space = self._start.space
        return nearest_limit(
            space.budget.model_copy(update={"trials": space.most_trials}),
            num_ended=len(self._ended),
            seconds=time.monotonic() - self._began_at,
            gpu_hours=training_seconds([*self._ended, *self._paused.values()])
            * space.resources.gpus_per_trial
            / 3600,
        )

    def _confirming(self, open_trials: Sequence[RunningTrial]) -> Spent | None:
        """Return how far the runs that confirm are; None if they have not begun."""
        assert self._start is not None and self._start.space is not None, "a search has begun"
        done, most = len(self._confirmed), self._start.space.confirm.most_runs
        if not done and not any(trial.record.confirms for trial in open_trials):
            return None
        return Spent(
            min(1.0, done / max(1, most)),
            f"confirming on fresh seeds: {done} of at most {most} runs",
        )


def _objective(start: RunStart) -> str:
    metric, *others = (each.metric for each in start.objective.all)
    return " and ".join([metric + by_rules(config_values(start.config), metric), *others])


def _header(start: RunStart) -> str:
    """Return what is searched, until when, and where the results and the dashboard are."""
    assert start.space is not None, "a search has a space"
    space = start.space
    searched = ", ".join(str(parameter.key) for parameter in space.parameters)
    lines = [
        start.description,
        f"searched: {searched}; objective: {_objective(start)}; "
        f"budget: {describe_budget(space.budget)}; {start.concurrency} at once",
        f"results: {start.folder}",
        describe_cluster(start.dashboard_url, start.is_own_cluster),
        describe_data(start.data),
    ]
    return "\n".join(lines)
