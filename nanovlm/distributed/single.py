"""Runs one job through the same worker group that serves the trials of a search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanovlm.config import TrainConfig
from nanovlm.data.build import OnProgress, log_progress
from nanovlm.data.sources import pin_data
from nanovlm.distributed.jobs import run_to_end
from nanovlm.distributed.session import OnRecord, OnStart, StopSwitch, session
from nanovlm.errors import UserError
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.search.sections import TrialResources
from nanovlm.training.loop import num_steps
from nanovlm.trial import check_backbones, check_start


def trial_resources(config: TrainConfig, workers: int) -> TrialResources:
    """Return what a single run occupies: a GPU for each worker where this machine has any.

    Raises:
        UserError: if there are more workers than samples in a batch.
    """
    if workers > config.batch_size:
        raise UserError(f"--workers: must not exceed batch_size={config.batch_size}, got {workers}")
    return TrialResources(
        workers=workers,
        cpus_per_worker=config.cpu_threads,
        gpus_per_worker=1 if torch.cuda.is_available() else 0,
    )


class SinglePlan(NamedTuple):
    """What a single run was made up to be, before it starts."""

    config: TrainConfig
    """With the version of each data set of the hub."""
    milestones: tuple[int, ...]
    """Samples seen at which it reports before the end."""
    data: Mapping[str, Any]
    """What the data was made from and what was left out of it; JSON."""


def plan_single(config: TrainConfig, on_progress: OnProgress = log_progress) -> SinglePlan:
    """Return the plan of a single run; prepares the data, since the epochs' ends follow from it.

    It reports at the ends of the epochs and every `eval_interval` steps, unless `eval_in_epochs`
    is off, and at the end.

    Args:
        on_progress: told how far it is when data has to be prepared.

    Raises:
        UserError: if the data cannot be had or is smaller than a batch.
    """
    check_start(config)
    check_backbones(config)
    resources = Resources("cpu", on_progress)
    resources.tokenizer(config.vlm.lm_tokenizer)
    config = pin_data(config)
    train_samples, _ = resources.training_data(config)
    resources.benchmark(config)
    milestones = _milestones(config, len(train_samples)) if config.eval_in_epochs else ()
    return SinglePlan(config, milestones, resources.describe_data(config))


def _milestones(config: TrainConfig, num_samples: int) -> tuple[int, ...]:
    last = num_steps(config, num_samples)
    ends = {epoch * num_samples for epoch in range(1, config.epochs)}
    if config.eval_interval:
        steps = range(config.eval_interval, last, config.eval_interval)
        ends |= {step * config.batch_size for step in steps}
    return tuple(sorted(end for end in ends if end <= last * config.batch_size))


def run_single(
    job: Job,
    resources: TrialResources,
    folder: Path,
    *,
    address: str | None,
    on_start: OnStart,
    on_record: OnRecord,
) -> None:
    """Run `job` to its end, or until a signal ends it before.

    Raises:
        UserError: if the cluster has not the resources.
    """
    switch = StopSwitch()
    with session(
        address, resources, 1, 1, folder.resolve(), switch, on_start, on_record
    ) as running:
        run_to_end(running.channel, [job])
