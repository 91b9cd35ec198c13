"""Every use of Ray's private parts, for which there is no public way.

For each, a test in `tests/cluster/test_ray_compat.py` names what breaks when Ray changes it.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services
from ray._private import worker as ray_driver
from ray._private.state import available_resources_per_node
from ray.exceptions import RpcError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ErroredState
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor

NO_ROOM = "its place on the cluster was taken meanwhile"


def temporary_folder() -> Path:
    """Return the folder in which Ray makes its sockets and logs by default."""
    return Path(get_default_ray_temp_dir())


def resolve_address(address: str) -> tuple[str, int]:
    """Return host and port of the cluster at `address`, which may be `auto`.

    Raises:
        OSError, ValueError: there is no such cluster, or it is no address.
    """
    host, _, port = services.canonicalize_bootstrap_address_or_die(address).rpartition(":")
    return host, int(port)


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each node by its id; Ray's public function has only their
    sum."""
    return dict(available_resources_per_node())


def head_answers(timeout_seconds: float) -> bool:
    """Return whether the head of the cluster (its GCS) answers. Public calls wait for it without an
    end, and Ray ends the process after a minute of that."""
    try:
        client: Any = ray_driver.global_worker.gcs_client  # type: ignore[attr-defined]
        client.internal_kv_exists(b"nanovlm", b"nanovlm", timeout=timeout_seconds)  # a key, or none
    except RpcError:
        return False
    return True


@contextlib.contextmanager
def prints_logged(logger: logging.Logger) -> Iterator[None]:
    """Log what Ray prints in spite of all settings of `ray.init`, such as processes that died."""

    def log(data: Any, ignore_prefix: bool) -> None:
        for line in data["lines"]:
            logger.warning("%s: %s", data["pid"], line)

    before = ray_driver.print_to_stdstream
    ray_driver.print_to_stdstream = log
    try:
        yield
    finally:
        ray_driver.print_to_stdstream = before


class ControllerHook(ControllerCallback):
    """Passes on the handle of a TorchTrainer's controller, by which it can be ended, and why it is
    about to end: it takes 12 s for that.

    In the controller's process, which serves this one trainer, it also has the workers bear the
    run's name in Ray's dashboard.
    """

    def __init__(
        self, run_name: str, on_start: Callable[[Any], object], on_error: Callable[[str], object]
    ) -> None:
        """
        Args:
            on_start: called in the controller's process with its handle; can be pickled.
            on_error: called there with the reason when the workers have failed; can be pickled.
        """
        self._run_name = run_name
        self._on_start = on_start
        self._on_error = on_error

    def after_controller_start(self, train_run_context: Any) -> None:
        self._on_start(ray.get_runtime_context().current_actor)
        WorkerGroup._worker_cls = shown_as(self._run_name, WorkerGroup._worker_cls)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        next_state = getattr(current_state, "next_state", None)
        if isinstance(next_state, ErroredState):
            self._on_error(describe_failure(next_state.training_failed_error))


def describe_failure(error: Exception) -> str:
    """Return in one line why a TorchTrainer has failed."""
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its controller has ended ({first_line(error)})"
    if isinstance(error, ControllerError):
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return NO_ROOM
        return f"its workers could not start ({first_line(error.controller_failure)})"
    failures = list(getattr(error, "worker_failures", {}).values())
    is_lost = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, ray.exceptions.RayError)
    raised = next((each for each in failures if not isinstance(each, is_lost)), None)
    return "a worker has ended" if raised is None else first_line(raised)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; Ray appends whole logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def shown_as(name: str, actor_class: type[Any]) -> Any:
    """Return the class of an actor that Ray's dashboard shows under a name."""
    return type(actor_class.__name__, (actor_class,), {"__repr__": lambda self: name})


def start_run_records() -> None:
    """Start the actor that keeps Ray Train's records of runs, unless the user has it off.

    Each controller starts it and waits for it: so it starts beside them.
    """
    if os.environ.get("RAY_TRAIN_ENABLE_STATE_TRACKING") == "1":
        get_or_create_state_actor()
