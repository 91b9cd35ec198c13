"""A worker group: a `TorchTrainer` that lives as long as the search and runs its trials.

Starting a TorchTrainer takes 5 to 40 s (workers, imports, process group); a search pays for it once
per concurrent trial instead of once per trial.
"""

import contextlib
import functools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pyarrow.fs import LocalFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from nanovlm.cluster.group_trainer import GroupTrainer
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.ray_compat import OneMachine
from nanovlm.cluster.worker import WorkerSettings, serve_trials
from nanovlm.config.search_settings import TrialResources
from nanovlm.files import identifier

_FREE_SECONDS = 10
"""How long Ray may take to free what a group has occupied."""

_REFRESH_SECONDS = 0.5
"""Until all nodes have published their free resources, which they do ten times a second."""

_POLLS_PER_SECOND = 64
"""Of all groups together: they take 6 % of a core. With 1,000 groups one that has lost a worker is
noticed within 16 s."""

_NODE_ID = "ray.io/node-id"
"""Ray's label of a node with its id."""

_SAME_TIME_SECONDS = 0.1
"""Tolerance when comparing two readings of the time at which a process began."""


@dataclass(frozen=True)
class ClusterSetup:
    """Where worker groups run."""

    resources: TrialResources
    """What each of them occupies."""
    log_dir: Path
    """For the logs of workers."""
    is_own_cluster: bool
    """Whether this program has started the cluster, on this machine alone."""
    check: NodeCheck | None = None
    """What its machines must have in common with this one."""
    asks_for_nodes: bool = False
    """Whether to ask the cluster's autoscaler for nodes as long as there are too few groups."""


def make_trainer(
    settings: WorkerSettings, setup: ClusterSetup, unfit: Collection[str], num_groups: int
) -> GroupTrainer:
    """Return what runs a worker group.

    Args:
        unfit: ids of nodes that take no part.
        num_groups: so many run at the same time.
    """
    resources = setup.resources
    scaling = ScalingConfig(  # type: ignore[call-arg]  # Ray's types are of its older class
        num_workers=resources.workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=resources.per_worker,
        label_selector={_NODE_ID: f"!in({','.join(sorted(unfit))})"} if unfit else None,
    )
    folder = Path(settings.log_dir).parent
    run_name = f"{identifier(folder.name)}-{settings.group}"  # for Ray's dashboard
    broker, group = settings.broker, settings.group
    return GroupTrainer(
        functools.partial(serve_trials, settings),
        owner=broker,
        on_failure=lambda reason: broker.lose.remote(group, reason),
        seconds_between_polls=num_groups / _POLLS_PER_SECOND,
        torch_config=OneMachine() if setup.is_own_cluster else None,
        scaling_config=scaling,
        run_config=RunConfig(
            name=run_name,
            storage_path=f"{settings.log_dir}/ray",
            storage_filesystem=LocalFileSystem(),  # a path is a path, whatever it looks like
            # A group that has lost anything ends, and another one starts where there is room.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def end_groups(
    trainers: Sequence[GroupTrainer],
    workers: Sequence[tuple[int, float]],
    is_own_cluster: bool,
    waits: bool,
) -> None:
    """End worker groups, and free what they have reserved on the cluster.

    Args:
        workers: process ids of their workers, and when these processes began.
        is_own_cluster: whether all processes are on this machine.
        waits: whether to return only when all is free.
    """
    for trainer in trainers:
        trainer.end()
    if is_own_cluster:
        for pid, began_at in workers:
            _kill_worker(pid, began_at)
    reserved = [each for trainer in trainers for each in trainer.reserved]
    for placement_group in reserved:
        remove_placement_group(placement_group)
    if waits and reserved:
        _wait_until_free(reserved)


def is_placed(trainer: GroupTrainer) -> bool:
    """Return whether a group occupies what it has reserved on the cluster."""
    return any(_state_of(reserved) == "CREATED" for reserved in trainer.reserved)


def _state_of(placement_group: PlacementGroup) -> str:
    return str(placement_group_table(placement_group)["state"])


def _kill_worker(pid: int, began_at: float) -> None:
    """Kill a worker: it may be in a compiler or an evaluation, or be stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - began_at) < _SAME_TIME_SECONDS:  # else the id is another's
            process.kill()


def _wait_until_free(reserved: Sequence[PlacementGroup]) -> None:
    deadline = time.monotonic() + _FREE_SECONDS
    while time.monotonic() < deadline and any(
        _state_of(placement_group) != "REMOVED" for placement_group in reserved
    ):
        time.sleep(0.1)
    time.sleep(_REFRESH_SECONDS)
