"""The tables and texts that a person sees in the terminal."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from nanovlm.config.search_settings import Objective
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER, left_the_race
from nanovlm.results.decisions import last_milestone
from nanovlm.results.pareto import values_of
from nanovlm.results.statistics import describe_accuracy
from nanovlm.results.summary import by_rules


def describe_data(data: Mapping[str, Any]) -> str:
    """Return in a line what the content of `data.json` comes to, and what was left out."""
    training = data["training"]
    subsets = training["subsets"]
    empty = [name for name, subset in subsets.items() if subset["rows"] and not subset["samples"]]
    left_out = [f"{number} {what}" for what, number in count_left_out(training).items()]
    left_out += [f"all of {name}" for name in empty]
    line = (
        f"data: {training['samples']} samples of {training['rows']} rows, "
        f"{data['benchmark']['samples']} questions"
    )
    return f"{line}; left out: {', '.join(left_out)} (data.json)" if left_out else line


def describe_cluster(cluster: str, dashboard_url: str | None) -> str:
    """Return the line on the Ray cluster and its dashboard."""
    address = f"dashboard: {dashboard_url} (token: `ray get-auth-token`)"
    return f"{cluster}, {address if dashboard_url else 'without a dashboard'}"


def describe_milestones(records: Iterable[TrialRecord], milestones: Sequence[int]) -> str:
    """Return at which milestones trials are, such as `8 at 1000 samples, 2 at 3000`.

    Args:
        milestones: samples seen, of which each report has reached one; ascending.
    """
    counts = Counter(last_milestone(milestones, r.samples_seen) or r.samples_seen for r in records)
    (lowest, number), *others = sorted(counts.items())
    return ", ".join([f"{number} at {lowest} samples", *(f"{n} at {m}" for m, n in others)])


def describe_score(record: TrialRecord, metric: str) -> str:
    """Return a trial's metric with its interval, `-` if it has none."""
    return describe_accuracy(record.metrics, metric) if metric in record.metrics else "-"


def describe_speed(record: TrialRecord) -> str:
    """Return the speed at the last report, such as `812 samples/s, data 0.4 %, MFU 41 %`.

    Nothing for a trial without one: it has not reported, or an earlier version wrote it down.
    """
    speed = record.reports[-1].speed if record.reports else None
    if speed is None:
        return ""
    utilization = speed.model_flops_utilization
    text = f"{two_digits(speed.samples_per_second)} samples/s, "
    text += f"data {100 * speed.data_wait_fraction:.1f} %"
    return text if utilization is None else f"{text}, MFU {two_digits(100 * utilization)} %"


def two_digits(value: float) -> str:
    """Return `812`, `41` or `8.3`: two digits that count, and all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def describe_duration(seconds: float) -> str:
    """Return `8 s`, `4:07` (minutes), `3:04:07` (hours) or `2 d 3:04 h`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{minutes:02} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """Return `lr_mp=0.0021 batch_size=64`."""
    return " ".join(f"{key}={format_value(value)}" for key, value in parameters.items())


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_KINDS = {
    "over_long_turns": "over-long turns",
    "incomplete_turns": "incomplete turns",
    "low_rated_turns": "turns rated too low",
    "rows_without_turns": "rows without turns",
    "rows_without_image": "rows without an image",
    "rows_with_too_many_images": "rows with too many images",
}


def count_left_out(training: Mapping[str, Any]) -> dict[str, int]:
    """Return how much of the training data was left out, by kind; kinds without any are left away.

    Args:
        training: of `data.json`, which may be an earlier version's.
    """
    subsets = training.get("subsets", {}).values()
    counts = {words: sum(subset.get(key, 0) for subset in subsets) for key, words in _KINDS.items()}
    bad = training.get("bad_rows", training.get("unreadable_images", ()))
    counts["unreadable rows"] = len(bad)
    return {words: number for words, number in counts.items() if number}


MAX_ROWS = 20
"""Trials in the final table."""

COLORS = {
    "completed": "green", "paused": "cyan", "stopped": "yellow", "failed": "red", "running": "blue",
}  # fmt: skip
"""Of a trial's state."""


def ranked(records: Sequence[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """Return the trials, the best first; a shorter trial never before a full one."""
    sign = -1 if objective.mode == "max" else 1
    order = ("completed", "paused", "stopped", "failed")

    def rank(record: TrialRecord) -> tuple[int, int, float]:
        value = record.metrics.get(objective.metric, math.inf)
        length = 0 if record.state == "completed" else record.samples_seen
        return order.index(record.state), -length, sign * value

    return sorted(records, key=rank)


def results_table(records: Sequence[TrialRecord], objective: Objective) -> Table:
    """Return the trials as a table, in the order of `ranked`."""
    shown = ranked(records, objective)[:MAX_ROWS]
    metric = objective.metric + (by_rules(records[0].config, objective.metric) if records else "")
    keys = sorted({key for record in records for key in record.parameters})
    others = [other.metric for other in objective.all[1:]]
    table = _empty_table(["trial", "state", "samples", metric, *others, *keys])
    for record in shown:
        values = values_of(objective, record) or (math.nan,) * len(objective.all)
        table.add_row(
            str(record.number),
            f"[{COLORS[record.state]}]{record.state}[/]",
            str(record.samples_seen),
            escape(describe_score(record, objective.metric)),
            *("-" if math.isnan(value) else f"{value:.4g}" for value in values[1:]),
            *_values(record.parameters, keys),
        )
    return table


def confirmation_table(confirmation: Mapping[str, Any], objective: Objective) -> Table:
    """Return a row for each configuration, the best first.

    Args:
        confirmation: as in `summary.json`.
    """
    configurations = confirmation["configurations"]
    keys = sorted({key for c in configurations for key in c["parameters"]})
    columns = ["trial", "runs", f"mean {objective.metric}", "in the search", "to the default", "p"]
    table = _empty_table([*columns, "left the race", *keys])
    for c in configurations:
        difference, error = c["difference_to_default"] or {}, c["standard_error"]
        table.add_row(
            "default" if c["number"] == DEFAULT_NUMBER else str(c["number"]),
            str(len(c["runs"])) + (f", {len(c['failed'])} failed" if c["failed"] else ""),
            _number(c["mean"]) + ("" if error is None else f" ± {error:.2g}"),
            _number(c["search_value"]),
            escape(_difference(difference)),
            _number(difference.get("p_value"), 2),
            left_the_race(c, objective) or "-",
            *_values(c["parameters"], keys),
        )
    return table


def _empty_table(columns: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    return table


def _values(parameters: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    return (escape(format_value(parameters.get(key, "-"))) for key in keys)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _difference(difference: Mapping[str, Any]) -> str:
    if not difference:
        return "-"
    interval: Sequence[float] | None = difference["interval_95"] or difference["seeds_interval_95"]
    text = f"{difference['mean']:+.3g}"
    return text if interval is None else f"{text} [{interval[0]:+.3g}, {interval[1]:+.3g}]"
