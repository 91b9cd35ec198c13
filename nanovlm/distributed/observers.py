"""Who watches every run, whoever started it."""

from nanovlm.config import TrainConfig
from nanovlm.observer import Observer
from nanovlm.results.report_writer import ReportWriter


def standard_observers(config: TrainConfig) -> list[Observer]:
    """Return the observers that a run with this configuration has.

    Args:
        config: of a single run, or the base of a search.
    """
    return [ReportWriter()]
