"""What a person sees while a search runs, and at its end.

A terminal gets a line for each trial that pauses or ends and, below them, a table of the running
ones with a bar for the budget. Anything else (a file, a pipe, `--quiet`) gets the lines alone.
"""

import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanovlm.config.search_settings import Budget
from nanovlm.config.sources import config_values
from nanovlm.files import shown
from nanovlm.messages import End, ProgressUpdate, TrialRecord
from nanovlm.results.conclusion import describe_unconfirmed_gain
from nanovlm.results.read import ANSWERS_DIR, BEST_CONFIG_FILE, REPORT_FILE
from nanovlm.results.summary import best_record, by_rules, final_best, training_seconds
from nanovlm.results.write import describe_run
from nanovlm.watch.observer import RunStart
from nanovlm.watch.terminal.console import PLAIN, RunDisplay, can_redraw
from nanovlm.watch.terminal.tables import (
    COLORS,
    confirmation_table,
    describe_cluster,
    describe_data,
    describe_duration,
    describe_milestones,
    describe_score,
    describe_speed,
    format_parameters,
    results_table,
    two_digits,
)

_REFRESHES_PER_SECOND = 4
_LINES_BESIDE_ROWS = 6
"""Of the live part: head of the table, best, bar, and space for a line above."""
_BAR_WIDTH = 12
_BUDGET_BAR_WIDTH = 24


class Spent(NamedTuple):
    """The limit of a budget that will be reached first, and how far it is."""

    share: float
    """From 0 to 1."""
    text: str
    """Such as `9 of 16 trials`."""


def nearest_limit(
    budget: Budget, *, num_ended: int, seconds: float, gpu_hours: float
) -> Spent | None:
    """Return the limit that most is spent of; None if none of them can be foreseen.

    `budget.target` and `budget.patience` end a search when they like.
    """
    spent: list[tuple[float | None, float, str]] = [
        (budget.trials, num_ended, "{:g} of {:g} trials"),
        (budget.hours, seconds / 3600, "{:.2g} of {:g} hours"),
        (budget.gpu_hours, gpu_hours, "{:.2g} of {:g} GPU-hours"),
    ]
    limits = [
        Spent(min(1.0, done / most), text.format(done, most))
        for most, done, text in spent
        if most is not None
    ]
    return max(limits, key=lambda limit: limit.share, default=None)


def describe_budget(budget: Budget) -> str:
    """Return all limits, such as `16 trials, 2 hours`."""
    limits = {
        "{:g} trials": budget.trials,
        "{:g} hours": budget.hours,
        "{:g} GPU-hours": budget.gpu_hours,
        "a value of {:g}": budget.target,
        "{:g} trials without a new best": budget.patience,
    }
    return ", ".join(text.format(value) for text, value in limits.items() if value is not None)


RunningTrial = tuple[TrialRecord, ProgressUpdate | None]
"""A trial under way, and its latest update; None before the first."""


def running_table(
    trials: Sequence[RunningTrial], metric: str, milestones: Sequence[int], max_rows: int
) -> Table:
    """Return a row for each running trial, and a line on those beyond `max_rows`.

    Args:
        milestones: samples seen at which trials are compared.
    """
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("running", "", "samples", "next", metric, "loss", "/s", "left"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("running", "") else "right")
    if not trials:
        table.add_row("waiting for workers")
    for trial in trials[:max_rows]:
        table.add_row(*_row(trial, metric, milestones))
    if len(trials) > max_rows:
        table.add_row(f"and {len(trials) - max_rows} more")
    return table


def _row(trial: RunningTrial, metric: str, milestones: Sequence[int]) -> list[Text | ProgressBar]:
    record, update = trial
    score = describe_score(record, metric)
    seed = f" seed {record.config['seed']}" if record.confirms else ""
    name = Text(f"{'confirm' if record.confirms else 'trial'} {record.number}{seed}")
    if update is None:
        return [name, Text("starting"), *map(Text, ("-", "-", score, "-", "-", "-"))]
    total, seen = update.total_samples, update.samples_seen
    bar = ProgressBar(total=total, completed=seen, width=_BAR_WIDTH)
    following = next((m for m in (*milestones, total) if m > seen), total)
    rate = update.samples_per_second
    texts = [str(seen), "asking" if update.stage == "evaluating" else str(following), score]
    texts += [f"{update.train_loss:.3g}", two_digits(rate) if rate else "-"]
    texts += [describe_duration((total - seen) / rate) if rate else "-"]
    return [name, bar, *map(Text, texts)]


def budget_bar(spent: Spent | None, done: str, seconds: float) -> Table:
    """Return the bar of the whole search.

    Args:
        spent: the limit that comes first; None if none can be foreseen.
        done: what is done, where there is no such limit.
        seconds: since the search began.
    """
    bar = ProgressBar(
        total=1.0 if spent else None,
        completed=spent.share if spent else 0.0,
        width=_BUDGET_BAR_WIDTH,
        pulse=spent is None,
    )
    left = seconds * (1 - spent.share) / spent.share if spent and spent.share else None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(
        bar,
        Text(spent.text if spent else done),
        Text(describe_duration(seconds)),
        Text("" if left is None else f"about {describe_duration(left)} left", style="dim"),
    )
    return table


class SearchDisplay(RunDisplay):
    """Shows a search."""

    _start: RunStart

    def __init__(self, console: Console, is_quiet: bool = False) -> None:
        super().__init__(console)
        self._lock = threading.Lock()  # what is shown is read by the thread that redraws
        self._running: dict[str, RunningTrial] = {}
        self._paused: dict[str, TrialRecord] = {}
        self._ended: list[TrialRecord] = []
        self._confirmed: list[TrialRecord] = []
        self._is_live = can_redraw(console) and not is_quiet
        self._live: Live | None = None

    def begin(self, start: RunStart) -> None:
        self._start, self._objective = start, start.objective
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

    def progress(self, update: ProgressUpdate) -> None:
        with self._lock:
            if update.trial_id in self._running:
                self._running[update.trial_id] = self._running[update.trial_id][0], update

    def trial_changed(self, record: TrialRecord) -> None:
        super().trial_changed(record)
        with self._lock:
            before = self._running.pop(record.trial_id, None)
            self._paused.pop(record.trial_id, None)
            if record.is_paused:
                self._paused[record.trial_id] = record
            elif record.end is None:
                self._running[record.trial_id] = record, before and before[1]
            else:
                (self._confirmed if record.confirms else self._ended).append(record)
        has_paused = record.is_paused and before is not None  # else it paused in an earlier run
        if has_paused or record.end is not None:
            # What does not fit in a line of a terminal is in the report.
            cut = {"no_wrap": True, "overflow": "ellipsis", "crop": True}
            self._console.print(
                self._line(record), **(cut if self._is_live else {"soft_wrap": True})
            )

    def end(self, summary: Mapping[str, Any]) -> None:
        """Print what the search has come to."""
        self.stop()
        show, confirmation = self._console.print, summary["confirmation"]
        show(f"\nended: {summary['ended_by']}\n", **PLAIN)
        if self._ended:
            show(results_table(self._ended, self._objective))
        if left := "; ".join(self._left_behind()):
            show(f"\n{left}", **PLAIN)
        if confirmation is not None:
            show()
            show(confirmation_table(confirmation, self._objective))
            show(f"\n{confirmation['verdict']}", **PLAIN)
        if (pareto := summary.get("pareto")) and pareto["front"]:
            show(f"\nchosen: {pareto['reason']}", **PLAIN)
        if (report := self._start.folder / REPORT_FILE).exists():
            show(f"\nreport: {shown(report)}", **PLAIN)
        best = final_best(self._ended, self._objective, self._confirmed, confirmation)
        if best is None:
            show("\nno trial ran its full budget, so there is no best.yaml")
        else:
            show(f"\n{self._best(best, confirmation is not None)}", **PLAIN)

    def _best(self, best: TrialRecord, is_confirmed: bool) -> str:
        """Return what the best run is, what it gains, and how to run it again."""
        metric, folder = self._objective.metric, self._start.folder
        line = f"best: {describe_run(best)}, {metric} {describe_score(best, metric)}"
        line += by_rules(best.config, metric)
        if not is_confirmed:
            answers = folder / ANSWERS_DIR
            gain = describe_unconfirmed_gain(best, self._ended, self._objective, answers)
            line += f"; {gain}" if gain else ""
        command = f"python run_single.py --config {shlex.quote(shown(folder / BEST_CONFIG_FILE))}"
        return f"{line}; run it again:\n{command}"

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self, record: TrialRecord) -> Text:
        metric, color = self._objective.metric, COLORS[record.state]
        score = describe_score(record, metric)
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
        with self._lock:
            trials = sorted(self._running.values(), key=lambda trial: trial[0].submitted_at)
            counts, spent = self._counts(), self._confirming() or self._spent()
        running = [trial for trial in trials if trial[0].worker_group is not None]
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
            score = describe_score(best, self._objective.metric)
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
        if records:
            yield f"{len(records)} {what} ({describe_milestones(records, self._start.milestones)})"

    def _spent(self) -> Spent | None:
        assert self._start.space is not None, "a search has a space"
        space = self._start.space
        seconds = training_seconds([*self._ended, *self._paused.values()])
        return nearest_limit(
            space.budget.model_copy(update={"trials": space.most_trials}),
            num_ended=len(self._ended),
            seconds=time.monotonic() - self._began_at,
            gpu_hours=seconds * space.resources.gpus_per_trial / 3600,
        )

    def _confirming(self) -> Spent | None:
        """Return the progress of the runs that confirm; None if they have not begun."""
        assert self._start.space is not None, "a search has a space"
        done, most = len(self._confirmed), self._start.space.confirm.most_runs
        if not done and not any(record.confirms for record, _ in self._running.values()):
            return None
        share = min(1.0, done / max(1, most))
        return Spent(share, f"confirming on fresh seeds: {done} of at most {most} runs")


def _header(start: RunStart) -> str:
    """Return what is searched, until when, and where the results and the dashboard are."""
    assert start.space is not None, "a search has a space"
    space = start.space
    searched = ", ".join(str(parameter.key) for parameter in space.parameters)
    metric, *others = (each.metric for each in start.objective.all)
    judged = " and ".join([metric + by_rules(config_values(start.config), metric), *others])
    lines = [
        start.description,
        f"searched: {searched}; objective: {judged}; "
        f"budget: {describe_budget(space.budget)}; {start.concurrency} at once",
        f"results: {shown(start.folder)}",
        describe_cluster(start.cluster, start.dashboard_url),
        describe_data(start.data),
    ]
    return "\n".join(lines)
