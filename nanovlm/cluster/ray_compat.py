"""Every use of Ray's private parts, for which there is no public way.

For each, a test in `tests/cluster/test_ray_compat.py` names what breaks when Ray changes it.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
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
from ray.train.torch import TorchConfig
from ray.train.torch.config import _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor

from nanovlm.errors import UserError


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; Ray appends whole logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:") if lines else type(error).__name__


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

    Each controller starts it if it is not there: so it starts before them, and once.
    """
    if os.environ.get("RAY_TRAIN_ENABLE_STATE_TRACKING") == "1":
        get_or_create_state_actor()
