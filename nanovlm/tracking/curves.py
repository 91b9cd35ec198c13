"""What trackers draw of a trial: its reports and pulses, each as numbers at samples seen."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nanovlm.config_files import flat_values
from nanovlm.messages import Pulse, Report, TrialRecord


def report_values(report: Report) -> dict[str, float]:
    """Return the numbers of a report: metrics by name, speed as `speed/...`."""
    speed = {} if report.speed is None else asdict(report.speed)
    values = {
        "step": report.step,
        "seconds": report.seconds,
        **report.metrics,
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


def new_reports(record: TrialRecord, after: float) -> Iterator[Report]:
    """Yield the record's reports after so many samples seen.

    A trial whose workers died makes its reports again; they are the same ones.
    """
    yield from (report for report in record.reports if report.samples_seen > after)


def config_texts(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return a configuration with keys as on the command line, and lists and null as text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flat_values(config).items()
    }
