"""A small search as its observers are told of it: three trials, one that is stopped, one fails."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values
from nanovlm.config.space import load_space
from nanovlm.messages import ProgressUpdate, Report, TrialRecord, TrialState
from nanovlm.watch.observer import Observer, RunStart
from tests.records import make_record, make_report, make_speed

SPACE = """
preset: digits
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
"""
STOPPED_BY = "0.3 after 300 samples; one in 3 goes on, which takes 0.6 or more here, says the rung"


def start(folder: Path, log_wandb: bool = False, **values: Any) -> RunStart:
    """Return the start of the search in the folder, which is made."""
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(SPACE)
    space = load_space(folder / "space.yaml")
    return RunStart(
        folder=folder,
        config=dataclasses.replace(space.base, log_wandb=log_wandb),
        space=space,
        objective=Objective(),
        milestones=(100, 300),
        trial_samples=900,
        data={},
        **values,
    )


def record(number: int, num_reports: int, state: TrialState, **values: Any) -> TrialRecord:
    """Return the record of a trial that has made so many of its three reports."""
    reports = [report(number, samples) for samples in (100, 300, 900)[:num_reports]]
    return make_record(
        number,
        state,
        parameters={"lr_mp": 0.001 * (number + 1)},
        config=config_values(TrainConfig(lr_mp=0.001 * (number + 1))),
        reports=reports,
        submitted_at=1000.0 * number,
        worker_group="group-0",
        **values,
    )


def report(number: int, samples_seen: int) -> Report:
    accuracy = samples_seen / 1000 + number / 100
    return make_report(
        samples_seen,
        {"mmstar_accuracy": accuracy, "mmstar_accuracy/math": 0.5, "train_loss": 0.7},
        step=samples_seen // 10,
        seconds=samples_seen / 100,
        evaluation_seconds=0.5,
        speed=make_speed(samples_per_second=50.0 + number, data_wait_fraction=0.25),
    )


COMPLETED = record(0, 3, "completed")
STOPPED = record(1, 2, "stopped", reason=STOPPED_BY)
FAILED = record(2, 1, "failed", reason="loss is nan at step 17")
ENDED = (COMPLETED, STOPPED, FAILED)


def update(number: int, samples_seen: int) -> ProgressUpdate:
    return ProgressUpdate(
        trial_id=f"trial-{number:04d}",
        stage="training",
        step=samples_seen // 10,
        samples_seen=samples_seen,
        total_samples=900,
        train_loss=1.5,
        samples_per_second=60.0 + number,
        data_wait_fraction=0.125,
    )


def summary(ended_by: str) -> Mapping[str, Any]:
    return {
        "name": "demo",
        "ended_by": ended_by,
        "trials": {"total": 3, "completed": 1, "stopped": 1, "failed": 1},
        "best": {"trial_id": "trial-0000", "metrics": {"mmstar_accuracy": 0.9}},
    }


def follow_trial(observer: Observer, ended: TrialRecord) -> None:
    """Tell of a trial from its first step to its end."""
    for count in range(len(ended.reports) + 1):
        observer.trial_changed(record(ended.number, count, "running"))
        observer.progress(update(ended.number, 100 * count + 50))
    observer.trial_changed(ended)
