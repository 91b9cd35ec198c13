"""Trials of three reports, for the tests of the broker."""

from nanovlm.config.schema import TrainConfig
from nanovlm.messages import Job, ProgressUpdate, Report
from tests.records import make_update

ENDS = (10, 20, 30)
"""Samples seen at the reports of a trial."""
CONFIG = TrainConfig()


def job(number: int) -> Job:
    return Job(trial_id=f"trial-{number}", number=number, config=CONFIG)


def report(index: int, value: float = 0.5) -> Report:
    return Report(
        samples_seen=ENDS[index],
        step=index,
        metrics={"mmstar_accuracy": value},
        seconds=1.0,
        is_final=index == len(ENDS) - 1,
    )


def update(number: int) -> ProgressUpdate:
    return make_update(f"trial-{number}", 1)
