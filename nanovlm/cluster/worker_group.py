"""Worker groups: each a `TorchTrainer` that lives as long as the search and runs its trials.

Starting a TorchTrainer takes 10 to 40 s (controller, workers, imports, process group); a search
pays for it once per concurrent trial instead of once per trial.
"""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
from pyarrow.fs import LocalFileSystem
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanovlm.cluster.broker import Broker, GroupParts
from nanovlm.cluster.ray_compat import ControllerHook, OneMachine, first_line, start_run_records
from nanovlm.cluster.worker import RunTrial, WorkerSettings, serve_trials
from nanovlm.config.search_settings import TrialResources
from nanovlm.files import identifier
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

_GOODBYE_SECONDS = 20
"""How long a group may take to leave: a training step, an evaluation, or Ray's own clean-up."""

_FREE_SECONDS = 10
"""How long Ray may take to free what a group has occupied."""

_REFRESH_SECONDS = 0.5
"""Until all nodes have published their free resources, which they do ten times a second."""

_MAX_RESTARTS = 100
"""Of the workers of one group; a job that kills its workers is given up long before that."""

_MAX_FALSE_STARTS = 3
"""A slot stays empty after so many groups in a row ended before they asked for a job."""

_MAX_WAITING_CALLS = 10_000
"""Of the broker: a few for each trial that runs."""

_SAME_TIME_SECONDS = 0.1
"""Tolerance when comparing two readings of the time at which a process began."""


class WorkerGroups(Protocol):
    """The worker groups of a run."""

    error: Exception | None
    """Why the last worker group has ended although there was work."""

    def have_ended(self) -> bool:
        """Return whether there is no worker group any more."""

    def end_groups(self, names: Sequence[str]) -> None:
        """End groups that do not answer; others take their places."""


StartWorkers = Callable[
    [int, Any, TrialResources, Path, bool], AbstractContextManager[WorkerGroups]
]
"""The signature of `worker_groups`."""


class RayWorkerGroups:
    """Slots for worker groups; a group that ends is replaced as long as there is work."""

    def __init__(
        self, num_slots: int, broker: Any, is_own_cluster: bool, run_group: Callable[[str], object]
    ) -> None:
        """Start a worker group in each slot.

        Args:
            is_own_cluster: see `worker_groups`.
            run_group: runs the group of a name to its end; raises if there was still work.
        """
        self.error: Exception | None = None
        self._broker = broker
        self._is_own_cluster = is_own_cluster
        self._run_group = run_group
        self._numbers = itertools.count()
        self._groups: set[str] = set()  # those that have not ended
        self._is_leaving = False
        self._slots = [
            threading.Thread(target=self._fill_slot, daemon=True) for _ in range(num_slots)
        ]
        for slot in self._slots:
            slot.start()

    def have_ended(self) -> bool:
        return not any(slot.is_alive() for slot in self._slots)

    def end_groups(self, names: Sequence[str]) -> None:
        """End controllers and workers, and free what they had reserved on the cluster."""
        try:
            groups: list[GroupParts] = ray.get([self._broker.parts_of.remote(n) for n in names])
        except RayActorError:
            return  # the cluster ends them with the driver
        for parts in groups:
            for controller in parts.controllers:
                ray.kill(controller)
            if self._is_own_cluster:  # all processes are on this machine
                for pid, began_at in parts.workers:
                    _kill_worker(pid, began_at)
        if not (self._is_own_cluster and self._is_leaving):  # else all ends with the cluster
            _free([group for parts in groups for group in parts.placement_groups.values()])

    def leave(self) -> None:
        try:
            ray.get(self._broker.close.remote())
            ray.wait([self._broker.wait_until_idle.remote()], timeout=_GOODBYE_SECONDS)
        except RayActorError:
            return  # only the broker knows the groups' processes; they end with the driver
        finally:
            self._is_leaving = True
        self.end_groups(sorted(self._groups))
        for slot in self._slots:
            slot.join(_GOODBYE_SECONDS)

    def _fill_slot(self) -> None:
        """Run one group after another, until one leaves because there is no more work."""
        false_starts = 0
        while not self._is_leaving:
            name = f"group-{next(self._numbers)}"
            self._groups.add(name)
            try:
                self._run_group(name)
                return
            except Exception as error:
                if self._is_leaving:
                    return
                logger.exception("worker group %s has ended", name)
                reason, last_error = f"its controller has ended ({first_line(error)})", error
            try:
                had_asked = ray.get(self._broker.lose.remote(name, reason))
            except RayActorError:
                return  # the broker is lost too
            self.end_groups([name])
            self._groups.discard(name)
            false_starts = 0 if had_asked else false_starts + 1
            if false_starts == _MAX_FALSE_STARTS:
                self.error = last_error
                return


def _make_trainer(
    settings: WorkerSettings, resources: TrialResources, is_own_cluster: bool
) -> TorchTrainer:
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    scaling = ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={kind: amount for kind, amount in per_worker.items() if amount},
    )
    folder = Path(settings.log_dir).parent
    run_name = f"{identifier(folder.name)}-{settings.group}"  # for Ray's dashboard
    hook = ControllerHook(
        run_name, lambda handle: settings.broker.add_controller.remote(settings.group, handle)
    )
    return TorchTrainer(
        functools.partial(serve_trials, settings),
        torch_config=OneMachine() if is_own_cluster else None,
        scaling_config=scaling,
        run_config=RunConfig(
            name=run_name,
            storage_path=f"{settings.log_dir}/ray",
            storage_filesystem=LocalFileSystem(),  # a path is a path, whatever it looks like
            failure_config=FailureConfig(max_failures=_MAX_RESTARTS),
            callbacks=[hook],  # type: ignore[list-item]
        ),
    )


@contextlib.contextmanager
def opened_broker(run_name: str, stall_seconds: float | None = None) -> Iterator[Any]:
    """Yield the handle of a new Broker actor, which bears the run's name and ends with the context.

    Names of actors are unique within one program on a cluster, so runs of the same name do not
    meet. The actor runs on this program's node, so that it is lost only with that node.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker: Any = (
        ray.remote(Broker)
        .options(
            name=f"nanovlm-broker-{identifier(run_name)}",
            num_cpus=0,
            max_concurrency=_MAX_WAITING_CALLS,
            scheduling_strategy=here,
        )
        .remote(stall_seconds)
    )
    try:
        yield broker
    finally:
        ray.kill(broker)


@contextlib.contextmanager
def worker_groups(
    num_groups: int,
    broker: Any,
    resources: TrialResources,
    log_dir: Path,
    is_own_cluster: bool,
    run_trial: RunTrial = run_trial,
) -> Iterator[WorkerGroups]:
    """Run worker groups on the connected cluster; at the end close the broker and end the groups.

    A TorchTrainer takes some 12 s to end by itself, since Ray 2.60 waits for the time-out of its
    PlacementGroupCleaner. So controllers are killed as soon as the work is done, and what they had
    reserved on the cluster is freed here.

    Args:
        log_dir: for the logs of workers and controllers.
        is_own_cluster: whether this program has started the cluster, on this machine alone.
        run_trial: what the workers run for each trial.
    """
    start_run_records()

    def run_group(name: str) -> None:
        settings = WorkerSettings(name, broker, str(log_dir), run_trial)
        _make_trainer(settings, resources, is_own_cluster).fit()

    groups = RayWorkerGroups(num_groups, broker, is_own_cluster, run_group)
    try:
        yield groups
    finally:
        groups.leave()


def _kill_worker(pid: int, began_at: float) -> None:
    """Kill a worker: it may be in a compiler or an evaluation, or be stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - began_at) < _SAME_TIME_SECONDS:  # else the id is another's
            process.kill()


def _free(reserved: list[PlacementGroup]) -> None:
    """Free what is reserved on the cluster, and the workers in it; return when it is free."""
    for placement_group in reserved:
        remove_placement_group(placement_group)
    deadline = time.monotonic() + _FREE_SECONDS
    while time.monotonic() < deadline and any(
        placement_group_table(placement_group)["state"] != "REMOVED" for placement_group in reserved
    ):
        time.sleep(0.1)
    if reserved:
        time.sleep(_REFRESH_SECONDS)
