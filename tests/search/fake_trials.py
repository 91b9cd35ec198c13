"""Trials that only pretend to train; in a module of their own, so that Ray's workers find them."""

import time
from collections.abc import Callable, Generator
from dataclasses import replace

from nanovlm.messages import Job, Report
from nanovlm.resources import Resources
from nanovlm.training.meter import OnUpdate, ignore
from nanovlm.training.steps import TrialInterrupted


def pretend(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    for samples_seen in (*job.milestones, 900):
        yield Report(
            samples_seen=samples_seen,
            step=samples_seen // 100,
            metrics={"mmstar_accuracy": job.config.lr_mp * samples_seen, "train_loss": 1.0},
            seconds=1.0,
            first_step_seconds=0.1,
            is_final=samples_seen == 900,
        )


def pretend_without_objective(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    for report in pretend(job, resources, interrupted):
        yield replace(report, metrics={"train_loss": 1.0})


def pretend_to_diverge(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    for report in pretend(job, resources, interrupted):
        yield replace(report, metrics={"mmstar_accuracy": float("nan"), "train_loss": 1.0})


class HangOnce:
    """The first trial hangs after its first report, as in a collective that another worker left."""

    def __init__(self) -> None:
        self.has_hung = False

    def __call__(
        self, job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate
    ) -> Generator[Report, None, None]:
        for index, report in enumerate(pretend(job, resources, interrupted)):
            if index == 1 and not self.has_hung:
                self.has_hung = True
                while not interrupted():
                    time.sleep(0.05)
                raise TrialInterrupted
            yield report
