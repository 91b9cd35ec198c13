"""The part of the terminal that changes while trials run: a row for each, and a bar below."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanovlm.config.search_settings import Budget
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.results.statistics import describe_accuracy
from nanovlm.watch.terminal.tables import describe_duration, two_digits

_BAR_WIDTH = 12
_BUDGET_BAR_WIDTH = 24


@dataclass(frozen=True)
class Spent:
    """The limit of a budget that will be reached first, and how far it is."""

    share: float
    """From 0 to 1."""
    text: str
    """Such as `9 of 16 trials`."""

    def seconds_left(self, seconds: float) -> float | None:
        """Return the seconds until the limit if all goes on at its pace; None before it has one.

        Args:
            seconds: that the search has taken so far.
        """
        return seconds * (1 - self.share) / self.share if self.share else None


def nearest_limit(
    budget: Budget, *, num_ended: int, seconds: float, gpu_hours: float
) -> Spent | None:
    """Return the limit that most is spent of; None if none of them can be foreseen.

    `budget.target` and `budget.patience` end a search when they like.
    """
    limits = []
    if budget.trials is not None:
        limits.append(Spent(num_ended / budget.trials, f"{num_ended} of {budget.trials} trials"))
    if budget.hours is not None:
        hours = seconds / 3600
        limits.append(Spent(hours / budget.hours, f"{hours:.2g} of {budget.hours:g} hours"))
    if budget.gpu_hours is not None:
        share = gpu_hours / budget.gpu_hours
        limits.append(Spent(share, f"{gpu_hours:.2g} of {budget.gpu_hours:g} GPU-hours"))
    if not limits:
        return None
    nearest = max(limits, key=lambda limit: limit.share)
    return Spent(min(1.0, nearest.share), nearest.text)


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


@dataclass(frozen=True)
class RunningTrial:
    """A trial under way."""

    record: TrialRecord
    update: ProgressUpdate | None
    """The latest; None before the first."""


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
    record, update = trial.record, trial.update
    score = describe_accuracy(record.metrics, metric) if metric in record.metrics else "-"
    name = Text(_name(record))
    if update is None:
        return [name, Text("starting"), *map(Text, ("-", "-", score, "-", "-", "-"))]
    total, seen = update.total_samples, update.samples_seen
    bar = ProgressBar(total=total, completed=seen, width=_BAR_WIDTH)
    following = next((m for m in (*milestones, total) if m > seen), total)
    rate = update.samples_per_second
    is_asked = update.stage == "evaluating"
    return [
        name,
        bar,
        Text(str(seen)),
        Text("asking" if is_asked else str(following)),
        Text(score),
        Text(f"{update.train_loss:.3g}"),
        Text(two_digits(rate) if rate else "-"),
        Text(describe_duration((total - seen) / rate) if rate else "-"),
    ]


def _name(record: TrialRecord) -> str:
    seed = f" seed {record.config['seed']}" if record.confirms else ""
    return f"{'confirm' if record.confirms else 'trial'} {record.number}{seed}"


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
    left = spent.seconds_left(seconds) if spent else None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(
        bar,
        Text(spent.text if spent else done),
        Text(describe_duration(seconds)),
        Text("" if left is None else f"about {describe_duration(left)} left", style="dim"),
    )
    return table
