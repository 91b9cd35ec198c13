"""A `TorchTrainer` that costs no process but its workers. It uses Ray Train's private parts.

Ray Train starts an actor for the controller of each run, and another one as a barrier for
`ray.train.report`: two processes on the driver's node, some 350 MiB and 5 s of CPU time for each
worker group. Here the controller runs in the thread that calls `fit`, and as reports go through the
broker, nothing needs the barrier. `tests/cluster/test_group_trainer.py` names what breaks when Ray
changes one of these parts.
"""

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import ErroredState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import (
    RayTrainWorker,
    WorkerGroup,
    state,
    worker_group,
)
from ray.train.v2._internal.state.state_manager import TrainStateManager
from ray.util.placement_group import PlacementGroup

from nanovlm.cluster.ray_compat import first_line

NO_ROOM = "its place on the cluster was taken meanwhile"
ENDED = "its workers gave no sign of life"
"""Why a run that goes on ends a group."""

_MISSING_PACKAGE = re.compile(r"No module named '([\w.]+)'")

_STARTING_ACTORS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""One hands out the shards of Ray's datasets, of which there are none; the other frees what a lost
controller had reserved, and ours is lost only with the driver."""


class GroupEnded(Exception):
    """Somebody has called `GroupTrainer.end`."""


class GroupTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs where `fit` is called, in any thread."""

    def __init__(
        self,
        train_loop_per_worker: Callable[[], None],
        owner: Any,
        on_failure: Callable[[str], object],
        seconds_between_polls: float = 0.0,
        **options: Any,
    ) -> None:
        """
        Args:
            owner: handle of an actor that lives as long as the run; Ray's dashboard shows it as the
                run's controller.
            on_failure: called with the reason as soon as workers have failed, before what is left
                of them is ended.
            seconds_between_polls: the least time between two looks at the workers, each of which
                costs 1 ms of CPU time; Ray's own minimum counts too.
            options: those of TorchTrainer.
        """
        super().__init__(train_loop_per_worker, **options)
        self.reserved: list[PlacementGroup] = []
        """What the workers occupy on the cluster, or are about to."""
        self._owner = owner
        self._on_failure = on_failure
        self._failure: Exception | None = None
        self._seconds_between_polls = seconds_between_polls
        self._lock = threading.Lock()
        self._is_ended = False
        self._cancel: Callable[[], object] | None = None

    def end(self) -> None:
        """Have `fit` raise GroupEnded at its next step, or what its workers have failed with.

        It may wait for workers until then: who ends these and frees `reserved` wakes it up.
        """
        with self._lock:
            self._is_ended = True
            if self._cancel is not None:
                self._cancel()

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # of Ray's older class
        kept = [each for each in made if not isinstance(each, _STARTING_ACTORS)]
        return [self._in_this_process(each) for each in kept] + [_FailureTeller(self._take_failure)]

    def _take_failure(self, error: Exception) -> None:
        self._failure = error
        self._on_failure(describe_failure(error))

    def _in_this_process(self, callback: Any) -> Any:
        if isinstance(callback, StateManagerCallback):
            return _RunRecords(self._owner)
        return callback

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config
        parts["scaling_policy"] = _ReservedSize(scaling)
        controller_class = _controller_class(str(self.run_config.name), self.reserved.append)
        try:
            return asyncio.run(self._control(controller_class, parts))
        except asyncio.CancelledError:
            raise self._failure or GroupEnded(ENDED) from None

    async def _control(self, controller_class: Any, parts: dict[str, Any]) -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._is_ended:
                raise GroupEnded(ENDED)
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            controller = controller_class(**parts)
            controller._health_check_interval_s = max(
                controller._health_check_interval_s, self._seconds_between_polls
            )
            await controller.run()
        finally:
            with self._lock:  # the loop is about to close
                self._cancel = None
        return controller.get_result()


def _controller_class(run_name: str, on_reserve: Callable[[PlacementGroup], object]) -> Any:
    """Return the class of a controller that is no actor."""

    class Group(WorkerGroup):
        _worker_cls = shown_as(run_name, RayTrainWorker)

        def _create_placement_group(self, *arguments: Any) -> Any:
            handle = super()._create_placement_group(*arguments)
            on_reserve(handle.placement_group)
            return handle

        def _init_train_context_on_workers(
            self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
        ) -> None:
            """Tell the workers about their run, which has no controller that they could call."""
            told = [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[rank] for name, values in train_context_args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
            ray.get(told)
            self._decorate_worker_log_file_paths(workers)

    class Controller(TrainController):
        worker_group_cls = Group

    return Controller


class _NoBarrier:
    """Stands where Ray would start the actor for the barrier of `ray.train.report`."""

    @staticmethod
    def options(**_: Any) -> type["_NoBarrier"]:
        return _NoBarrier

    @staticmethod
    def remote(**_: Any) -> str:
        return "none: reports go through the broker"


# There is no other way to a worker group without it; controllers of others are actors, in processes
# of their own.
worker_group.SynchronizationActor = _NoBarrier  # type: ignore[misc,assignment]
state._shutdown_sync_actor = lambda sync_actor: None


class _RunRecords(StateManagerCallback):
    """Ray's records of a run, for its dashboard."""

    def __init__(self, owner: Any) -> None:
        super().__init__(datasets={})
        self._owner = owner

    def after_controller_start(self, train_run_context: Any) -> None:
        """Begin the records as Ray does, but with the owner in the place of the controller: Ray
        counts a run as aborted when that actor is gone."""
        self._state_manager = _UnwaitedRecords()
        self._run_name = train_run_context.get_run_config().name
        self._run_id = train_run_context.run_id
        self._job_id = ray.get_runtime_context().get_job_id()
        self._controller_actor_id = self._owner._actor_id.hex()
        self._state_manager.create_train_run(
            id=self._run_id,
            name=self._run_name,
            job_id=self._job_id,
            controller_actor_id=self._controller_actor_id,
            controller_log_file_path=None,  # type: ignore[arg-type]  # its log is the driver's
            run_config=train_run_context.run_config,
            train_loop_config=None,
            scaling_config=train_run_context.scaling_config,
            backend_config=train_run_context.backend_config,
            datasets={},
            dataset_config=train_run_context.dataset_config,
        )


class _UnwaitedRecords(TrainStateManager):
    """Waits for no answer of the actor that keeps the records, which takes seconds to start.

    Ray waits lest the controller ends before its messages are out; here it ends with the program.
    """

    def _create_or_update_train_run(self, run: Any, *, block: bool = False) -> None:
        super()._create_or_update_train_run(run)

    def _create_or_update_train_run_attempt(self, run_attempt: Any, *, block: bool = False) -> None:
        super()._create_or_update_train_run_attempt(run_attempt)


class _ReservedSize(FixedScalingPolicy):
    """A fixed number of workers, of which nobody is told: an autoscaler sees their reservation, and
    what the run wants besides (`NodeRequests`). Ray's own policy starts an actor for it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _FailureTeller(ControllerCallback):
    def __init__(self, on_failure: Callable[[Exception], object]) -> None:
        self._on_failure = on_failure

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        next_state = getattr(current_state, "next_state", None)
        if isinstance(next_state, ErroredState):
            self._on_failure(next_state.training_failed_error)


def describe_failure(error: Exception) -> str:
    """Return in one line why a trainer has failed."""
    if isinstance(error, GroupEnded):
        return str(error)
    if missing := _MISSING_PACKAGE.search(str(error)):
        return (
            f"a node has no package {missing[1]!r}: all machines need those of requirements.lock "
            "and nanovlm itself"
        )
    if isinstance(error, ControllerError):
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return NO_ROOM
        return f"its workers could not start ({first_line(error.controller_failure)})"
    failures = list(getattr(error, "worker_failures", {}).values())
    is_lost = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, ray.exceptions.RayError)
    raised = next((each for each in failures if not isinstance(each, is_lost)), None)
    return "a worker has ended" if raised is None else first_line(raised)


def shown_as(name: str, actor_class: type[Any]) -> Any:
    """Return the class of an actor that Ray's dashboard shows under a name."""
    return type(actor_class.__name__, (actor_class,), {"__repr__": lambda self: name})
