"""Worker groups: each a `TorchTrainer` that lives as long as the search and serves its trials.

Starting a TorchTrainer takes 10 to 40 s (controller, workers, imports, process group); here it is
paid once per concurrent trial instead of once per trial.
"""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import ray
from pyarrow.fs import LocalFileSystem
from ray._private.ray_constants import env_bool
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup as ray_workers
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from nanovlm.distributed.channel import Channel
from nanovlm.distributed.worker import RunTrial, WorkerSettings, serve_trials
from nanovlm.identifiers import identifier
from nanovlm.search.sections import TrialResources
from nanovlm.trial import run_trial

logger = logging.getLogger(__name__)

_GOODBYE_SECONDS = 20
"""How long a group may take to leave: a training step, an evaluation, or Ray's own clean-up."""

_GIVE_BACK_SECONDS = 10
"""How long Ray may take to free what a group has occupied."""

_REFRESH_SECONDS = 0.5
"""Until all nodes of a cluster have told what is free on them; Ray does ten times a second."""

_MAX_RESTARTS = 100
"""Of one group; a job that kills its workers is given up long before that."""

_MAX_WAITING_CALLS = 10_000
"""Of the channel: a few for each trial that runs."""


class Workers(Protocol):
    """What serves the trials of one slot, wherever it runs."""

    error: Exception | None
    """Why it has ended although there was work."""

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended."""


StartWorkers = Callable[
    [int, Any, TrialResources, Path, bool], AbstractContextManager[Sequence[Workers]]
]
"""`worker_groups`, or what takes its place in a test or a measurement; the arguments are its."""


class WorkerGroup:
    """One TorchTrainer in a thread of this process; its workers are actors of the cluster."""

    def __init__(self, settings: WorkerSettings, resources: TrialResources) -> None:
        self.name = settings.group
        self.error: Exception | None = None
        self.is_leaving = False
        scaling = ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_per_worker(resources),
        )
        folder = Path(settings.log_dir).parent
        run_name = f"{identifier(folder.name)}-{self.name}"  # for Ray's dashboard
        self._trainer = TorchTrainer(
            functools.partial(serve_trials, settings),
            scaling_config=scaling,
            run_config=RunConfig(
                name=run_name,
                storage_path=f"{settings.log_dir}/ray",
                storage_filesystem=LocalFileSystem(),  # a path is a path, whatever it looks like
                failure_config=FailureConfig(max_failures=_MAX_RESTARTS),
                callbacks=[_ControllerKnown(settings.channel, run_name)],  # type: ignore[list-item]
            ),
        )
        self._thread = threading.Thread(target=self._fit, name=self.name, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            if not self.is_leaving:
                logger.exception("worker group %s has ended", self.name)
                self.error = error

    def join(self, seconds: float | None = None) -> None:
        """Wait until the group has ended."""
        self._thread.join(seconds)


class _ControllerKnown(ControllerCallback):
    """Makes the controller of a TorchTrainer known to the channel, so that it can be ended.

    In the controller's process, which serves this one group, it also sees to it that the workers
    bear the run's name in Ray's dashboard.
    """

    def __init__(self, channel: Any, run_name: str) -> None:
        self._channel = channel
        self._run_name = run_name

    def after_controller_start(self, train_run_context: Any) -> None:
        self._channel.add_controller.remote(ray.get_runtime_context().current_actor)
        ray_workers._worker_cls = _shown_as(self._run_name, ray_workers._worker_cls)


def _shown_as(name: str, actor_class: type[Any]) -> Any:
    """Return the class of an actor that Ray's dashboard shows under a name."""
    return type(actor_class.__name__, (actor_class,), {"__repr__": lambda self: name})


@contextlib.contextmanager
def opened_channel(run_name: str) -> Iterator[Any]:
    """Give the handle of a new Channel actor, which bears the run's name and ends with the context.

    Names of actors are unique within what one program does on a cluster, so runs of the same name
    do not meet.
    """
    options = {"num_cpus": 0, "max_concurrency": _MAX_WAITING_CALLS}
    name = f"nanovlm-channel-{identifier(run_name)}"
    channel: Any = ray.remote(Channel).options(name=name, **options).remote()
    try:
        yield channel
    finally:
        ray.kill(channel)


@contextlib.contextmanager
def worker_groups(
    num_groups: int,
    channel: Any,
    resources: TrialResources,
    log_dir: Path,
    is_own_cluster: bool,
    run_trial: RunTrial = run_trial,
) -> Iterator[tuple[WorkerGroup, ...]]:
    """Start worker groups on the connected cluster; close the channel and end them at last.

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
    groups = tuple(
        WorkerGroup(WorkerSettings(f"group-{i}", channel, str(log_dir), run_trial), resources)
        for i in range(num_groups)
    )
    try:
        yield groups
    finally:
        ray.get(channel.close.remote())
        ray.wait([channel.wait_until_home.remote()], timeout=_GOODBYE_SECONDS)
        for group in groups:
            group.is_leaving = True
        for controller in ray.get(channel.get_controllers.remote()):
            ray.kill(controller)
        if is_own_cluster:
            for pid in ray.get(channel.get_worker_pids.remote()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # it may sit in a compiler or an evaluation
        else:
            _give_back(ray.get(channel.get_placement_groups.remote()))
        for group in groups:
            group.join(_GOODBYE_SECONDS)


def _give_back(placement_groups: Sequence[PlacementGroup]) -> None:
    """Free what is reserved on the cluster, and the workers in it; return when it is free."""
    for placement_group in placement_groups:
        remove_placement_group(placement_group)
    deadline = time.monotonic() + _GIVE_BACK_SECONDS
    while time.monotonic() < deadline and any(
        placement_group_table(placement_group)["state"] != "REMOVED"
        for placement_group in placement_groups
    ):
        time.sleep(0.1)
    time.sleep(_REFRESH_SECONDS)


def _per_worker(resources: TrialResources) -> dict[str, float]:
    need = {"CPU": resources.cpus_per_worker}
    return need | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})
