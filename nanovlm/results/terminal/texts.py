"""Numbers and findings in a few words, as the programs show them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanovlm.messages import TrialRecord
from nanovlm.results.left_out import count_left_out


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


def describe_cluster(dashboard_url: str | None, is_own: bool) -> str:
    """Return the line on the Ray cluster and its dashboard."""
    kind = "own Ray cluster" if is_own else "joined Ray cluster"
    if dashboard_url is None:
        return f"{kind}, without a dashboard"
    return f"{kind}, dashboard: {dashboard_url} (token: `ray get-auth-token`)"


def describe_places(records: Iterable[TrialRecord], milestones: Sequence[int]) -> str:
    """Return at which milestones trials are, such as `8 at 1000 samples, 2 at 3000`.

    Args:
        milestones: samples seen, of which each report has reached one; ascending.
    """
    places = Counter(
        max((m for m in milestones if m <= r.samples_seen), default=r.samples_seen) for r in records
    )
    return ", ".join(
        f"{number} at {milestone}" + (" samples" if place == 0 else "")
        for place, (milestone, number) in enumerate(sorted(places.items()))
    )


def describe_speed(record: TrialRecord) -> str:
    """Return the speed at the last report, such as `812 samples/s, data 0.4 %, MFU 41 %`.

    Nothing for a trial without one: it has not reported, or an earlier version wrote it down.
    """
    speed = record.reports[-1].speed if record.reports else None
    if speed is None:
        return ""
    utilization = speed.model_flops_utilization
    parts = [
        f"{two_digits(speed.samples_per_second)} samples/s",
        f"data {100 * speed.data_wait_fraction:.1f} %",
    ]
    if utilization is not None:
        parts.append(f"MFU {two_digits(100 * utilization)} %")
    return ", ".join(parts)


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
