"""Runs one job through the same worker group that serves the trials of a search."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanovlm import process
from nanovlm.cluster.logs import logged_to
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.recorder import Recorder, RunOutcome, standard_observers
from nanovlm.cluster.relay import job_in, run_to_end
from nanovlm.cluster.worker_pool import INTERRUPTED, StopSwitch, WorkerPool, worker_pool
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective, TrialResources
from nanovlm.config.sources import config_values, earlier_values, flat_values
from nanovlm.data.build import OnProgress, log_progress
from nanovlm.data.sources import pin_data
from nanovlm.errors import UserError
from nanovlm.resources import Resources
from nanovlm.results.folder import check_same_data, explain_full_disk
from nanovlm.results.read import CONFIG_FILE, LOGS_DIR, FolderReader
from nanovlm.results.write import ResultsStore
from nanovlm.training.loop import num_steps
from nanovlm.trial import check_backbones, check_start, metric_names
from nanovlm.watch.observer import Observer, RunStart
from nanovlm.watch.wandb_runs import check_wandb

TRIAL_ID = "trial-0000"
OBJECTIVE = Objective()


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
    """A single run before it starts."""

    config: TrainConfig
    """With the version of each data set of the hub."""
    milestones: tuple[int, ...]
    """Samples seen at which it reports before the end."""
    trial_samples: int
    """Samples that it sees until its end."""
    data: Mapping[str, Any]
    """Sources of the data, and what was left out of it; JSON."""


def plan_single(config: TrainConfig, on_progress: OnProgress = log_progress) -> SinglePlan:
    """Return the plan of a single run; prepares the data, since the epochs' ends follow from it.

    It reports at the ends of the epochs and every `eval_interval` steps, unless `eval_in_epochs`
    is off, and at the end.

    Args:
        on_progress: called with the progress when data has to be prepared.

    Raises:
        UserError: if the data cannot be had or is smaller than a batch.
    """
    check_wandb(config)
    check_start(config)
    check_backbones(config)
    resources = Resources("cpu", on_progress)
    resources.tokenizer(config.vlm)
    config = pin_data(config)
    train_samples, _ = resources.training_data(config)
    metric_names(config, resources)  # fails now, if the benchmark cannot be scored
    milestones = _milestones(config, train_samples.epoch_size) if config.eval_in_epochs else ()
    total = num_steps(config, train_samples.epoch_size) * config.batch_size
    return SinglePlan(config, milestones, total, resources.describe_data(config))


def _milestones(config: TrainConfig, num_samples: int) -> tuple[int, ...]:
    last = num_steps(config, num_samples)
    ends = {epoch * num_samples for epoch in range(1, config.epochs)}
    if config.eval_interval:
        steps = range(config.eval_interval, last, config.eval_interval)
        ends |= {step * config.batch_size for step in steps}
    return tuple(sorted(end for end in ends if end <= last * config.batch_size))


def run_single(
    plan: SinglePlan,
    folder: Path,
    resources: TrialResources,
    *,
    default_name: str | None = None,
    resume: bool = False,
    address: str | None = None,
    observers: Sequence[Observer] = (),
) -> RunOutcome:
    """Run what `plan_single` has planned to its end, or until a signal ends it before.

    Args:
        folder: the results folder, which must not exist yet.
        default_name: see `ResultsStore`.
        resume: continue the run that was interrupted in `folder`, from its last report.
        address: of a Ray cluster to join; None starts one here and ends it afterwards.
        observers: in addition to those that every run has.

    Raises:
        UserError: if the cluster lacks the resources, or there is no such run to resume.
        RunFailed: the disk is full, or a part of the cluster is lost.
    """
    unchecked: tuple[str, ...] = ()
    if resume:
        check_same_config(folder, plan.config)
        unchecked = check_same_data(folder, plan.data)
    store = ResultsStore(folder, OBJECTIVE, resources.gpus_per_trial, default_name=default_name)
    watching = [*standard_observers(), *observers]
    with (
        process.in_order(),
        store.opened(resume=resume),
        logged_to(store.folder / LOGS_DIR),
        explain_full_disk(store.folder),
    ):
        start = RunStart(
            folder=store.folder,
            config=plan.config,
            objective=OBJECTIVE,
            milestones=plan.milestones,
            trial_samples=plan.trial_samples,
            data=plan.data,
            earlier_seconds=store.earlier_seconds,
        )
        recorder = Recorder(store, start, watching)
        path = store.folder.resolve()
        job = job_in(path, TRIAL_ID, config=plan.config, milestones=plan.milestones)
        with (
            recorder.errors_recorded(),
            _worker_pool(plan, path, resources, address, recorder) as pool,
        ):
            run_to_end(pool.client, lambda: [job], pool.num_slots)
        ended = store.records
        summary = recorder.end((ended[-1].reason or "completed") if ended else INTERRUPTED)
        notes = (*unchecked, *store.notes, *recorder.notes())
    return RunOutcome(store.folder, summary, notes)


def _worker_pool(
    plan: SinglePlan,
    folder: Path,
    resources: TrialResources,
    address: str | None,
    recorder: Recorder,
) -> AbstractContextManager[WorkerPool]:
    return worker_pool(
        address,
        resources,
        concurrency=None,
        max_concurrency=1,
        folder=folder,
        switch=StopSwitch(),
        on_start=recorder.begin,
        on_events=recorder.take,
        check=NodeCheck.of(plan.config, plan.data),
    )


def check_same_config(folder: Path, config: TrainConfig) -> None:
    """Raise UserError if the folder holds no run of this configuration that can be resumed."""
    reader = FolderReader(folder)
    if not reader.has(CONFIG_FILE):
        raise UserError(f"--resume: {folder} holds no single run to go on with (no {CONFIG_FILE})")
    records, _ = reader.ended()
    before = earlier_values(reader.config() or {})
    now = flat_values(config_values(config))
    reader.raise_if_damaged()
    if records:
        raise UserError(f"--resume: the run in {folder} is over; another --name starts a new one")
    differing = [key for key in now if before[key] != now[key]]
    if differing:
        raise UserError(
            f"--resume: the run in {folder} has another configuration; its {CONFIG_FILE} differs "
            f"in {', '.join(differing)}"
        )
