"""Every use of Ray's private parts, for which there is no public way.

For each, a test in `tests/cluster/test_ray_compat.py` names what breaks when Ray changes it.
"""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private import worker as ray_driver
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import available_resources_per_node
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError, RpcError
from ray.train import ControllerError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ErroredState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor

from nanovlm.errors import UserError

_MISSING_PACKAGE = re.compile(r"No module named '([\w.]+)'")

NO_ROOM = "its place on the cluster was taken meanwhile"


def temporary_folder() -> Path:
    """Return the folder in which Ray makes its sockets and logs by default."""
    return Path(get_default_ray_temp_dir())


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray, here and in processes that are started, take this machine for 127.0.0.1, as it does
    by itself on macOS.

    All that it starts meanwhile listens there alone; by default it listens on all interfaces.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, given = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(variable)
        if given is not None:
            os.environ[variable] = given


@dataclass(frozen=True)
class LocalNode:
    """A node of a cluster that runs on this machine."""

    cluster: str
    """HOST:PORT of its cluster."""
    user_id: int


def local_nodes() -> list[LocalNode]:
    """Return the nodes on this machine, those of other users too."""
    nodes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if command and Path(command[0]).name == "raylet":
                options = dict(word.partition("=")[::2] for word in command[1:])
                nodes.append(LocalNode(options["--gcs-address"], process.uids().real))
    return nodes


def last_started_cluster() -> str | None:
    """Return HOST:PORT of the cluster to which the last `ray start` on this machine belonged."""
    address: str | None = read_ray_address(None)
    return address


_AUTH_MODE = "RAY_AUTH_MODE"


def set_auth_mode(mode: str | None) -> None:
    """Have Ray ask for and send tokens (`token`), neither (`disabled`), or choose (None)."""
    if mode is None:
        os.environ.pop(_AUTH_MODE, None)
    else:
        os.environ[_AUTH_MODE] = mode
    Config.initialize("")  # reads the environment again
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def auth_mode_kept() -> Iterator[None]:
    """Set the mode of authentication again afterwards: Ray changes it."""
    before = os.environ.get(_AUTH_MODE)
    try:
        yield
    finally:
        set_auth_mode(before)


def has_token() -> bool:
    """Return whether there is a token. Raises UserError if what should hold it does not."""
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise UserError(first_line(error)) from None


def answer_of(address: str, seconds: float) -> str:
    """Ask a cluster for its id, with the token in the mode `token`; return the status of gRPC, such
    as `OK` and `UNAUTHENTICATED`.

    Ray itself asks for 20 s or more, and prints a line every second.
    """
    channel = init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    try:
        request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
        stub.GetClusterId(request, timeout=seconds)
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        channel.close()
    return "OK"


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


_STARTING_ACTORS = (DatasetsCallback, PlacementGroupCleanerCallback)


class GroupTrainer(TorchTrainer):
    """A TorchTrainer that starts no actors for what it is not used for.

    One would hand out the shards of Ray's datasets, of which there are none. Another would free
    what a lost controller had reserved, which the program does. Each is a process of 150 MB on the
    head for each trainer, and a second until it is there; to part from the second one takes 12 s.
    A third, of 190 MB, would tell an autoscaler what trainers want; see `_ReservedSize`.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # of Ray's older class
        return [each for each in made if not isinstance(each, _STARTING_ACTORS)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config
        parts["scaling_policy"] = _ReservedSize(scaling)
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]


class _ReservedSize(FixedScalingPolicy):
    """A fixed number of workers, of which nobody is told: an autoscaler sees their reservation, and
    what the run wants besides (`NodeRequests`). Ray's own policy holds up each start for it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class ControllerHook(ControllerCallback):
    """Passes on the handle of a TorchTrainer's controller, by which it can be ended, what it
    reserves on the cluster, and why it is about to end.

    In the controller's process, which serves this one trainer, it also has the workers bear the
    run's name in Ray's dashboard.
    """

    def __init__(
        self,
        run_name: str,
        on_start: Callable[[Any], object],
        on_reserve: Callable[[Any], object],
        on_error: Callable[[str], object],
    ) -> None:
        """
        Args:
            on_start: called in the controller's process with its handle; can be pickled.
            on_reserve: called there with the placement group, before it is on the cluster; can be
                pickled.
            on_error: called there with the reason when the workers have failed; can be pickled.
        """
        self._run_name = run_name
        self._on_start = on_start
        self._on_reserve = on_reserve
        self._on_error = on_error

    def after_controller_start(self, train_run_context: Any) -> None:
        self._on_start(ray.get_runtime_context().current_actor)
        WorkerGroup._worker_cls = shown_as(self._run_name, WorkerGroup._worker_cls)
        _tell_reservations(self._on_reserve)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        next_state = getattr(current_state, "next_state", None)
        if isinstance(next_state, ErroredState):
            self._on_error(describe_failure(next_state.training_failed_error))


def _tell_reservations(on_reserve: Callable[[Any], object]) -> None:
    """Have the worker groups of this process tell what they reserve; no callback of Ray does."""
    reserve = WorkerGroup._create_placement_group

    def reserve_and_tell(worker_group: WorkerGroup, *arguments: Any) -> Any:
        handle = reserve(worker_group, *arguments)
        on_reserve(handle.placement_group)
        return handle

    WorkerGroup._create_placement_group = reserve_and_tell  # type: ignore[method-assign,assignment]


def describe_failure(error: Exception) -> str:
    """Return in one line why a TorchTrainer has failed."""
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its controller has ended ({first_line(error)})"
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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; Ray appends whole logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def shown_as(name: str, actor_class: type[Any]) -> Any:
    """Return the class of an actor that Ray's dashboard shows under a name."""
    return type(actor_class.__name__, (actor_class,), {"__repr__": lambda self: name})


class OneMachine(TorchConfig):
    """Has the workers of a trial, which are all on this machine, meet without an open port.

    By default they meet through a TCP store of torch, which listens on all interfaces.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OneMachineBackend


class _OneMachineBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        num_workers = len(worker_group)
        if num_workers == 1:
            return  # it has nobody to meet
        is_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        session = temporary_folder() / ray.get_runtime_context().get_session_name()
        store = f"file://{session}/{uuid.uuid4().hex}"
        worker_group.execute(_talk_on_loopback)
        setups = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend="nccl" if is_gpu else "gloo",
                world_rank=rank,
                world_size=num_workers,
                init_method=store,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(num_workers)
        ]
        ray.get(setups)


def _talk_on_loopback() -> None:
    """Have this worker's messages to the others go through the loopback interface."""
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(each.address == "127.0.0.1" for each in addresses)
    )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)


def start_run_records() -> None:
    """Start the actor that keeps Ray Train's records of runs, unless the user has it off.

    Each controller starts it and waits for it: so it starts beside them.
    """
    if os.environ.get("RAY_TRAIN_ENABLE_STATE_TRACKING") == "1":
        get_or_create_state_actor()
