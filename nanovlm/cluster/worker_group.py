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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from nanovlm.cluster.file_server import FileAccess, served_files
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.node_requests import NodeRequests
from nanovlm.cluster.ray_cluster import describe_shortage, num_fitting
from nanovlm.cluster.ray_compat import (
    NO_ROOM,
    ControllerHook,
    OneMachine,
    describe_failure,
    start_run_records,
)
from nanovlm.cluster.worker import RunTrial, WorkerSettings, serve_trials
from nanovlm.config.search_settings import TrialResources
from nanovlm.errors import RunFailed
from nanovlm.files import identifier
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

DESERTED = "all worker groups have ended"

_GOODBYE_SECONDS = 20
"""How long a group may take to leave: a training step, an evaluation, or Ray's own clean-up."""

_FREE_SECONDS = 10
"""How long Ray may take to free what a group has occupied."""

_REFRESH_SECONDS = 0.5
"""Until all nodes have published their free resources, which they do ten times a second."""

_MAX_FALSE_STARTS = 3
"""No more groups start after so many in a row ended before they asked for a job."""

_WAIT_FOR_ROOM_SECONDS = 1800.0
"""How long a run without worker groups waits for a node that has room for one."""

_MAX_WAITING_CALLS = 10_000
"""Of the broker: a few for each trial that runs."""

_NODE_ID = "ray.io/node-id"
"""Ray's label of a node with its id."""

_SAME_TIME_SECONDS = 0.1
"""Tolerance when comparing two readings of the time at which a process began."""


class WorkerGroups(Protocol):
    """The worker groups of a run."""

    def num_slots(self) -> int:
        """Return how many trials can run at the same time now."""

    def follow_cluster(self) -> None:
        """Start groups where there is room for them; called about once a second.

        Raises:
            RunFailed: if there is no group any more and none can be started.
        """

    def end_groups(self, names: Sequence[str]) -> None:
        """End groups that were lost; others take their places."""


@dataclass(frozen=True)
class ClusterSetup:
    """Where worker groups run."""

    resources: TrialResources
    """What each of them occupies."""
    log_dir: Path
    """For the logs of workers and controllers."""
    is_own_cluster: bool
    """Whether this program has started the cluster, on this machine alone."""
    asks_for_nodes: bool = False
    """Whether to ask the cluster's autoscaler for nodes as long as there are too few groups."""
    check: NodeCheck | None = None
    """What its machines must have in common with this one."""


StartWorkers = Callable[[int, int | None, Any, ClusterSetup], AbstractContextManager[WorkerGroups]]
"""The signature of `worker_groups`."""


class RayWorkerGroups:
    """Worker groups that follow the cluster: each runs until it is lost or there is no more work.

    A group that has lost a worker, its controller or its node ends. A new one starts wherever there
    is room: on what the lost one has freed, or on a node that has joined.
    """

    def __init__(
        self,
        num_groups: int,
        most: int | None,
        broker: Any,
        setup: ClusterSetup,
        run_group: Callable[[str, Collection[str]], object],
    ) -> None:
        """Start `num_groups` worker groups.

        Args:
            most: so many groups run at most; None sets no limit but the cluster's.
            run_group: runs the group of a name to its end, on none of the nodes with the given ids;
                raises if there was still work.
        """
        self._most = most
        self._broker = broker
        self._setup = setup
        self._requests = NodeRequests(setup.resources)
        self._run_group = run_group
        self._numbers = itertools.count()
        self._groups: dict[str, threading.Thread] = {}  # those that have not ended
        self._lost: set[str] = set()
        self._false_starts = 0
        self._error: Exception | None = None
        """Why the last group has ended before it asked for a job."""
        self._unfit: set[str] = set()
        """Ids of nodes on which a group could not begin its work."""
        self._without_room_since: float | None = None
        self._is_over = False
        self._lock = threading.Lock()
        for _ in range(num_groups):
            self._start_group()

    def num_slots(self) -> int:
        return max(1, len(self._groups))

    def follow_cluster(self) -> None:
        if self._is_over or self._false_starts >= _MAX_FALSE_STARTS:
            self._check_groups()
            return
        placed = set(ray.get(self._broker.placed_groups.remote()))
        with self._lock:
            num_starting = len(self._groups.keys() - placed)
        room = num_fitting(self._setup.resources, self._unfit) - num_starting
        if self._most is not None:
            room = min(room, self._most - len(self._groups))
        started = [self._start_group() for _ in range(room)]
        if started:
            now = len(self._groups)
            self._notify(f"started {', '.join(started)}; concurrent trials now: {now}")
        if self._setup.asks_for_nodes and self._most is not None and not self._unfit:
            self._requests.update(self._most - len(self._groups))
        self._check_groups()

    def _check_groups(self) -> None:
        """Raise RunFailed if there is no group, and waiting does not help."""
        if self._groups or self._is_over:
            self._without_room_since = None
            return
        if self._error is not None and num_fitting(self._setup.resources):
            reason = describe_failure(self._error)
            raise RunFailed(f"{DESERTED}: {reason}; see {self._setup.log_dir}") from self._error
        now = time.monotonic()
        shortage = describe_shortage(self._setup.resources)
        if self._without_room_since is None:
            self._without_room_since = now
            self._notify(f"no node has room, and the run waits for one: {shortage}")
        if now - self._without_room_since > _WAIT_FOR_ROOM_SECONDS:
            minutes = _WAIT_FOR_ROOM_SECONDS / 60
            raise RunFailed(f"no node has had room for {minutes:.0f} minutes: {shortage}")

    def _notify(self, text: str) -> None:
        ray.get(self._broker.notify.remote(text))

    def end_groups(self, names: Sequence[str]) -> None:
        """End controllers and workers, and free what they had reserved on the cluster."""
        self._lost.update(names)
        try:
            groups: list[GroupParts] = ray.get([self._broker.parts_of.remote(n) for n in names])
        except RayActorError:
            return  # the cluster ends them with the driver
        for parts in groups:
            for controller in parts.controllers:
                ray.kill(controller)
            if self._setup.is_own_cluster:  # all processes are on this machine
                for pid, began_at in parts.workers:
                    _kill_worker(pid, began_at)
        if not (self._setup.is_own_cluster and self._is_over):  # else all ends with the cluster
            _free([group for parts in groups for group in parts.placement_groups.values()])

    def leave(self) -> None:
        try:
            ray.get(self._broker.close.remote())
            ray.wait([self._broker.wait_until_idle.remote()], timeout=_GOODBYE_SECONDS)
        except RayActorError:
            return  # only the broker knows the groups' processes; they end with the driver
        finally:
            self._is_over = True
        self._requests.update(0)
        groups = dict(self._groups)
        self.end_groups(sorted(groups))
        for thread in groups.values():
            thread.join(_GOODBYE_SECONDS)

    def _start_group(self) -> str:
        name = f"group-{next(self._numbers)}"
        thread = threading.Thread(target=self._serve, args=(name,), name=name, daemon=True)
        with self._lock:
            self._groups[name] = thread
        thread.start()
        return name

    def _serve(self, name: str) -> None:
        """Run a group to its end; it leaves by itself only when there is no more work."""
        try:
            self._run_group(name, frozenset(self._unfit))
            self._is_over = self._is_over or name not in self._lost
        except Exception as error:
            if not self._is_over:
                logger.exception("worker group %s has ended", name)
                with contextlib.suppress(RayActorError):  # the broker is lost too
                    self._take_loss(name, error)
        finally:
            with self._lock:
                del self._groups[name]

    def _take_loss(self, name: str, error: Exception) -> None:
        reason = describe_failure(error)
        had_asked = ray.get(self._broker.lose.remote(name, reason))
        if had_asked:
            self._false_starts = 0
        elif reason != NO_ROOM:
            parts: GroupParts = ray.get(self._broker.parts_of.remote(name))
            self._error = error
            if len(parts.nodes) == 1:
                self._unfit |= parts.nodes  # others may do
            else:
                self._false_starts += 1


def _make_trainer(
    settings: WorkerSettings, setup: ClusterSetup, unfit: Collection[str]
) -> TorchTrainer:
    resources = setup.resources
    per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    scaling = ScalingConfig(  # type: ignore[call-arg]  # Ray's types are of its older class
        num_workers=resources.workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={kind: amount for kind, amount in per_worker.items() if amount},
        label_selector={_NODE_ID: f"!in({','.join(sorted(unfit))})"} if unfit else None,
    )
    folder = Path(settings.log_dir).parent
    run_name = f"{identifier(folder.name)}-{settings.group}"  # for Ray's dashboard
    broker, group = settings.broker, settings.group
    hook = ControllerHook(
        run_name,
        on_start=lambda handle: broker.add_controller.remote(group, handle),
        on_error=lambda reason: broker.lose.remote(group, reason),
    )
    return TorchTrainer(
        functools.partial(serve_trials, settings),
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
    most: int | None,
    broker: Any,
    setup: ClusterSetup,
    run_trial: RunTrial = run_trial,
) -> Iterator[WorkerGroups]:
    """Run worker groups on the connected cluster; at the end close the broker and end the groups.

    A TorchTrainer takes some 12 s to end by itself, since Ray 2.60 waits for the time-out of its
    PlacementGroupCleaner. So controllers are killed as soon as the work is done, and what they had
    reserved on the cluster is freed here.

    Args:
        num_groups: so many start.
        most: so many run at most, where the cluster has room for them; None: as many as fit.
        run_trial: what the workers run for each trial.
    """
    start_run_records()

    def run_group(name: str, unfit: Collection[str], files: FileAccess | None) -> None:
        settings = WorkerSettings(name, broker, str(setup.log_dir), run_trial, files, setup.check)
        _make_trainer(settings, setup, unfit).fit()

    with served_files(setup.log_dir.parent, setup.is_own_cluster) as files:
        run = functools.partial(run_group, files=files)
        groups = RayWorkerGroups(num_groups, most, broker, setup, run)
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
