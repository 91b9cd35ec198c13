"""Numbers and trials in the words of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.statistics import interval_95
from nanovlm.results.write import describe_run
from nanovlm.watch.terminal.tables import format_value

NOTHING = "–"  # noqa: RUF001 - a dash for an empty cell
MINUS = "\N{MINUS SIGN}"


def is_accuracy(metric: str) -> bool:
    return "accuracy" in metric


def metric_value(value: float | None, metric: str) -> str:
    """Return `96.6 %` for an accuracy, else the value in four digits."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if is_accuracy(metric) else f"{value:.4g}"


def metric_interval(interval: Sequence[float] | None, metric: str) -> str:
    """Return `95.4 to 97.5 %`; nothing without an interval."""
    if interval is None:
        return ""
    if is_accuracy(metric):
        return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def difference(value: float | None, metric: str) -> str:
    """Return `+16.2 points` for accuracies, else the signed difference."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f} points" if is_accuracy(metric) else f"{value:+.3g}"
    return text.replace("-", MINUS)


def difference_interval(interval: Sequence[float] | None, metric: str) -> str:
    """Return `+14.1 to +18.3`; nothing without an interval."""
    if interval is None:
        return ""
    scale, form = (100, "+.1f") if is_accuracy(metric) else (1, "+.3g")
    low, high = (f"{scale * end:{form}}".replace("-", MINUS) for end in interval)
    return f"{low} to {high}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Return `41 s`, `6 min 32 s`, `2 h 05 min` or `3 d 4 h`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def setting(value: Any) -> str:
    """Return a configuration value as a space file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting, value))}]"
    return format_value(value)


def settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {setting(value)}" for key, value in values.items())


def spent_seconds(record: TrialRecord) -> float:
    """Return how long a trial kept its workers busy."""
    if record.reports:
        return record.reports[-1].seconds
    if record.ended_at is None:
        return 0.0
    return max(0.0, record.ended_at - (record.first_step_at or record.submitted_at))


def scored(record: TrialRecord, metric: str) -> str:
    """Return the metric of a trial with its interval, such as `96.6 % (95.4 to 97.5 %)`."""
    value = metric_value(record.metrics.get(metric), metric)
    interval = metric_interval(interval_95(record.metrics, metric), metric)
    return f"{value} ({interval})" if interval else value


def run_name(record: TrialRecord) -> str:
    """Return `trial 7`, or for a run that confirms it `trial 7 on seed 3`."""
    return describe_run(record)
