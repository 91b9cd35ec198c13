"""Worker groups: each a `TorchTrainer` that lives as long as the search and serves its trials.

Starting a TorchTrainer takes 10 to 40 s (controller, workers, imports, process group); here it is
paid once per concurrent trial instead of once per trial.
"""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
from pyarrow.fs import LocalFileSystem
from ray._private.ray_constants import env_bool
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup as ray_workers
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanovlm.cluster.broker import Broker, GroupParts
from nanovlm.cluster.worker import RunTrial, WorkerSettings, serve_trials
from nanovlm.config.search_settings import TrialResources
from nanovlm.files import identifier
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

_GOODBYE_SECONDS = 20
"""How long a group may take to leave: a training step, an evaluation, or Ray's own clean-up."""

_GIVE_BACK_SECONDS = 10
"""How long Ray may take to free what a group has occupied."""

_REFRESH_SECONDS = 0.5
"""Until all nodes of a cluster have told what is free on them; Ray does ten times a second."""

_MAX_RESTARTS = 100
"""Of the workers of one group; a job that kills its workers is given up long before that."""

_MAX_FALSE_STARTS = 3
"""A slot whose groups have ended so often in a row before they asked for a job stays empty."""

_MAX_WAITING_CALLS = 10_000
"""Of the broker: a few for each trial that runs."""

_SAME_TIME_SECONDS = 0.1
"""By how much the times at which one process began may differ, as read at different moments."""


class WorkerGroups(Protocol):
    """What serves the trials of a session, wherever it runs."""

    error: Exception | None
    """Why the last worker group has ended although there was work."""

    def wait(self) -> None:
        """Return when there is no worker group any more."""

    def end_group(self, name: str) -> None:
        """End a group that does not answer; another one takes its place."""


StartWorkers = Callable[
    [int, Any, TrialResources, Path, bool], AbstractContextManager[WorkerGroups]
]
"""`worker_groups`, or what takes its place in a test or a measurement; the arguments are its."""


class RayWorkerGroups:
    """Slots for worker groups; one that ends is replaced as long as there is work."""

    def __init__(
        self,
        broker: Any,
        resources: TrialResources,
        log_dir: Path,
        is_own_cluster: bool,
        run_trial: RunTrial,
    ) -> None:
        self.error: Exception | None = None
        self._broker = broker
        self._resources = resources
        self._log_dir = log_dir
        self._is_own_cluster = is_own_cluster
        self._run_trial = run_trial
        self._numbers = itertools.count()
        self._groups: set[str] = set()  # those that there are
        self._is_leaving = False
        self._slots: list[threading.Thread] = []

    def start(self, concurrency: int) -> None:
        """Start a worker group in each slot."""
        for _ in range(concurrency):
            name = self._next_name()
            slot = threading.Thread(target=self._fill_slot, args=(name,), name=name, daemon=True)
            self._slots.append(slot)
            slot.start()

    def wait(self) -> None:
        for slot in self._slots:
            slot.join()

    def end_group(self, name: str) -> None:
        self._end_parts([self._parts_of(name)])

    def leave(self) -> None:
        """Close the broker and end all groups."""
        try:
            ray.get(self._broker.close.remote())
            ray.wait([self._broker.wait_until_home.remote()], timeout=_GOODBYE_SECONDS)
        except RayActorError:
            return  # with the broker all knowledge of the groups is gone; they end with the driver
        finally:
            self._is_leaving = True
        self._end_parts([self._parts_of(name) for name in sorted(self._groups)])
        for slot in self._slots:
            slot.join(_GOODBYE_SECONDS)

    def _next_name(self) -> str:
        name = f"group-{next(self._numbers)}"
        self._groups.add(name)
        return name

    def _fill_slot(self, name: str) -> None:
        """Run one group after another, until one goes home because there is no more work."""
        false_starts = 0
        while (error := self._run_group(name)) is not None and not self._is_leaving:
            logger.error("worker group %s has ended", name, exc_info=error)
            reason = f"its controller has ended ({_first_line(error)})"
            try:
                had_asked = ray.get(self._broker.lose.remote(name, reason))
                self.end_group(name)
            except RayActorError:
                return  # the broker is gone too
            self._groups.discard(name)
            false_starts = 0 if had_asked else false_starts + 1
            if false_starts == _MAX_FALSE_STARTS:
                self.error = error
                return
            name = self._next_name()

    def _run_group(self, name: str) -> Exception | None:
        """Run a worker group to its end; return why it has ended although there was work."""
        settings = WorkerSettings(name, self._broker, str(self._log_dir), self._run_trial)
        try:
            _make_trainer(settings, self._resources).fit()
        except Exception as error:
            return error
        return None

    def _parts_of(self, name: str) -> GroupParts:
        try:
            parts: GroupParts = ray.get(self._broker.parts_of.remote(name))
        except RayActorError:  # the cluster's own clean-up has to do
            return GroupParts()
        return parts

    def _end_parts(self, groups: Iterable[GroupParts]) -> None:
        """End controllers and workers, and give back what they had reserved on the cluster."""
        groups = list(groups)
        for parts in groups:
            for controller in parts.controllers:
                ray.kill(controller)
            if self._is_own_cluster:  # all processes are on this machine
                for pid, began_at in parts.workers:
                    _kill_worker(pid, began_at)
        if not (self._is_own_cluster and self._is_leaving):  # else all ends with the cluster
            _give_back([place for parts in groups for place in parts.placement_groups.values()])


def _make_trainer(settings: WorkerSettings, resources: TrialResources) -> TorchTrainer:
    scaling = ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=_per_worker(resources),
    )
    folder = Path(settings.log_dir).parent
    run_name = f"{identifier(folder.name)}-{settings.group}"  # for Ray's dashboard
    known = _ControllerKnown(settings.broker, settings.group, run_name)
    return TorchTrainer(
        functools.partial(serve_trials, settings),
        scaling_config=scaling,
        run_config=RunConfig(
            name=run_name,
            storage_path=f"{settings.log_dir}/ray",
            storage_filesystem=LocalFileSystem(),  # a path is a path, whatever it looks like
            failure_config=FailureConfig(max_failures=_MAX_RESTARTS),
            callbacks=[known],  # type: ignore[list-item]
        ),
    )


class _ControllerKnown(ControllerCallback):
    """Makes the controller of a TorchTrainer known to the broker, so that it can be ended.

    In the controller's process, which serves this one group, it also sees to it that the workers
    bear the run's name in Ray's dashboard.
    """

    def __init__(self, broker: Any, group: str, run_name: str) -> None:
        self._broker = broker
        self._group = group
        self._run_name = run_name

    def after_controller_start(self, train_run_context: Any) -> None:
        controller = ray.get_runtime_context().current_actor
        self._broker.add_controller.remote(self._group, controller)
        ray_workers._worker_cls = _shown_as(self._run_name, ray_workers._worker_cls)


def _shown_as(name: str, actor_class: type[Any]) -> Any:
    """Return the class of an actor that Ray's dashboard shows under a name."""
    return type(actor_class.__name__, (actor_class,), {"__repr__": lambda self: name})


@contextlib.contextmanager
def opened_broker(run_name: str, stall_seconds: float | None = None) -> Iterator[Any]:
    """Give the handle of a new Broker actor, which bears the run's name and ends with the context.

    Names of actors are unique within what one program does on a cluster, so runs of the same name
    do not meet. The actor is on the node of this program: it is lost with that one alone.

    Args:
        stall_seconds: see `nanovlm.cluster.broker_state.BrokerState`.
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
    """Start worker groups on the connected cluster; close the broker and end them at last.

    A TorchTrainer takes some 12 s to end by itself, since Ray 2.60 waits for the time-out of its
    PlacementGroupCleaner. So the controllers are ended as soon as the work is done, and what they
    had reserved on the cluster is given back here.

    Args:
        log_dir: for the logs of workers and controllers.
        is_own_cluster: whether all processes are on this machine and none is anyone else's.
        run_trial: what the workers run for each trial.
    """
    if env_bool(RAY_TRAIN_ENABLE_STATE_TRACKING, False):
        # Each controller waits for Ray Train's record of runs; so it starts beside them.
        get_or_create_state_actor()
    pool = RayWorkerGroups(broker, resources, log_dir, is_own_cluster, run_trial)
    pool.start(num_groups)
    try:
        yield pool
    finally:
        pool.leave()


def _kill_worker(pid: int, began_at: float) -> None:
    """End a worker at once: it may sit in a compiler or an evaluation, or be stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - began_at) < _SAME_TIME_SECONDS:  # else the id is another's
            process.kill()


def _give_back(placement_groups: list[PlacementGroup]) -> None:
    """Free what is reserved on the cluster, and the workers in it; return when it is free."""
    for placement_group in placement_groups:
        remove_placement_group(placement_group)
    deadline = time.monotonic() + _GIVE_BACK_SECONDS
    while time.monotonic() < deadline and any(
        placement_group_table(placement_group)["state"] != "REMOVED"
        for placement_group in placement_groups
    ):
        time.sleep(0.1)
    if placement_groups:
        time.sleep(_REFRESH_SECONDS)


def _per_worker(resources: TrialResources) -> dict[str, float]:
    need = {"CPU": resources.cpus_per_worker}
    return need | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
