"""What trackers draw of a trial: its reports and pulses, each as numbers at samples seen."""

from collections.abc import Iterator, Mapping
from typing import Any

from nanovlm.messages import Pulse, TrialRecord


def report_values(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one of a record's reports: metrics by name, speed as `speed/...`."""
    speed = entry.get("speed") or {}
    values = {
        "step": entry["step"],
        "seconds": entry["seconds"],
        **entry["metrics"],
        **{f"speed/{name}": value for name, value in speed.items() if value is not None},
    }
    return {name: float(value) for name, value in values.items()}


def pulse_values(pulse: Pulse) -> dict[str, float]:
    """Return the numbers of a training pulse, as `live/...`."""
    return {
        "live/train_loss": pulse.train_loss,
        "live/samples_per_second": pulse.samples_per_second,
        "live/data_wait_fraction": pulse.data_wait_fraction,
    }


def new_reports(record: TrialRecord, after: float) -> Iterator[Mapping[str, Any]]:
    """Yield the record's reports after so many samples seen.

    A trial whose workers died makes its reports again; they are the same ones.
    """
    yield from (entry for entry in record.reports if entry["samples_seen"] > after)


def flat_config(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return a configuration with keys as on the command line, and lists and null as text."""
    flat: dict[str, bool | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in flat_config(value).items()}
        else:
            flat[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
