"""The Ray cluster: joining or starting one, how many trials fit on it, and errors in plain words.

Ray starts and ends in a thread of its own, so that signals reach this program alone.
"""

import contextlib
import functools
import math
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from nanovlm import process
from nanovlm.cluster.jobs import token_file
from nanovlm.cluster.joining import (
    ExistingCluster,
    admission,
    describe_nodes,
    explain_failure,
)
from nanovlm.cluster.ray_compat import (
    auth_mode_kept,
    first_line,
    free_resources,
    on_loopback,
    temporary_folder,
)
from nanovlm.config.search_settings import TrialResources
from nanovlm.errors import UserError
from nanovlm.watch.observer import Observer, RunStart

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the user's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the results folder has its own records
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",  # the searcher limits them
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the workers through the broker
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # short trials are meant
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less for each worker group
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # controllers log to the driver's log
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # worker groups in Ray's dashboard, by name
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints nothing of its own then
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a change to come
    "RAY_worker_maximum_startup_concurrency": "8",  # a small machine starts more, and waits less
}


@dataclass(frozen=True)
class Cluster:
    """A connected cluster."""

    dashboard_url: str | None
    is_own: bool
    """Started by this program, and ended with it."""
    description: str
    """Which cluster it is, for the user."""


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Join the cluster at `address` (`auto`: the user's on this machine), or start one if None.

    As for Ray's own tools, the environment variable RAY_ADDRESS counts where `address` is None. Ray
    sets it for the programs of its jobs.

    A cluster that was started here ends with the context; an existing one is left running. If this
    process has called `ray.init` itself, it stays connected to its cluster.

    Raises:
        UserError: if there is no cluster at `address`, Ray cannot be started, or this process is
            connected to another cluster.
    """
    os.environ |= {key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()}
    if ray.is_initialized():
        yield _connected_before(address)
        return
    address = address or address_of_environment()
    admitted = contextlib.nullcontext() if address is None else admission(address)
    with auth_mode_kept(), admitted as existing, RayThread() as thread:
        start = start_ray if existing is None else functools.partial(join_ray, existing)
        try:
            yield thread.run(start)
        finally:
            thread.run(ray.shutdown)


def address_of_environment() -> str | None:
    """Return the cluster that RAY_ADDRESS names; None if it names none, or asks for an own one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS: must be HOST:PORT of a cluster to join, got {address!r}; --submit takes "
            "the address of a dashboard, and `env -u RAY_ADDRESS` starts the program without it"
        )
    return None if address in ("", "local") else address


def _connected_before(address: str | None) -> Cluster:
    present = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", present):
        raise UserError(
            f"address: this process is connected to the Ray cluster at {present} and cannot join "
            f"{address!r} too; `ray.shutdown()` leaves it"
        )
    dashboard = ray.init(ignore_reinit_error=True).dashboard_url  # changes nothing
    description = f"Ray cluster of this process at {present}: {describe_nodes()}"
    return Cluster(_url(dashboard), is_own=False, description=description)


def num_fitting(resources: TrialResources, excluded: Collection[str] = ()) -> int:
    """Return how many trials fit on the free resources of the cluster.

    Args:
        excluded: ids of nodes that take no part.
    """
    need = resources.per_worker
    num_workers = sum(
        min(math.floor(free.get(kind, 0) / amount) for kind, amount in need.items())
        for node, free in free_resources().items()
        if node not in excluded
    )
    return num_workers // resources.workers


def num_concurrent_trials(
    resources: TrialResources, wanted: int | None, is_own_cluster: bool
) -> int:
    """Return how many trials fit on the free resources of the cluster, at most `wanted`.

    Raises:
        UserError: if no trial fits, or on an own cluster fewer than `wanted`, since it never grows;
            the message has need and stock.
    """
    fits = num_fitting(resources)
    if fits >= (wanted or 1):
        return wanted or fits
    if wanted and not is_own_cluster:
        return fits
    raise UserError(f"resources: {describe_shortage(resources, wanted if fits else None)}")


def describe_shortage(resources: TrialResources, wanted: int | None = None) -> str:
    """Return what one trial, or `wanted` concurrent trials, need and what the cluster has."""
    need = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    have = ray.cluster_resources()
    what = f"{wanted} trials at once need" if wanted else "one trial needs"
    factor = resources.workers * (wanted or 1)
    free = free_resources().values()
    stock = " and ".join(
        f"{have.get(kind, 0):g} {kind}s ({sum(node.get(kind, 0) for node in free):g} free)"
        for kind in need
    )
    return (
        f"{what} {need['CPU'] * factor:g} CPUs and {need['GPU'] * factor:g} GPUs "
        f"({resources.workers} workers of {need['CPU']:g} CPUs and {need['GPU']:g} GPUs a trial), "
        f"but the cluster has {stock}"
    )


_PATIENCE_WITH_HEAD = ("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
"""Ray ends a process whose head is gone after 60 s; `worker_pool.py` ends it in order before."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
"""What Ray logs goes where `logs.py` has it."""

_SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""The longest socket of Ray below its folder."""
_LONGEST_SOCKET = 107 if sys.platform == "linux" else 103
"""Bytes that the system allows in a socket's path."""
_PYTHONS_SOCKET = "pymp-12345678/listener-12345678"
"""What Python's forkserver, which starts the parts of Ray's dashboard, puts below TMPDIR."""
_FREE_BYTES = 200 * 2**20
"""Room for Ray's logs of a search of a day."""

_ELSEWHERE = "RAY_TMPDIR=FOLDER has Ray use another folder"


def start_ray() -> Cluster:
    """Start a cluster that listens on this machine alone.

    Raises:
        UserError: with the reason and what helps.
    """
    _check_temporary_folder(temporary_folder())
    try:
        with on_loopback():
            context = ray.init(address="local", include_dashboard=True, **_QUIET)
    except Exception as error:
        raise UserError(_explain(error)) from error
    return Cluster(_url(context.dashboard_url), is_own=True, description="own Ray cluster")


def join_ray(cluster: ExistingCluster) -> Cluster:
    """Join a cluster that admits this program.

    Raises:
        UserError: with the reason and what helps.
    """
    os.environ.setdefault(*_PATIENCE_WITH_HEAD)
    try:
        context = ray.init(address=cluster.address, **_QUIET)
    except Exception as error:
        raise UserError(explain_failure(cluster.address, error)) from error
    return Cluster(_url(context.dashboard_url), is_own=False, description=cluster.describe())


def _url(dashboard: str | None) -> str | None:
    return f"http://{dashboard}" if dashboard else None


def _check_temporary_folder(folder: Path) -> None:
    """Raise UserError if Ray cannot use the folder for its sockets and logs."""
    _check_length("Python", Path(tempfile.gettempdir()), _PYTHONS_SOCKET, "TMPDIR=/tmp")
    _check_length("Ray", folder, _SOCKET.format(pid=os.getpid()), "RAY_TMPDIR=/tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"TMPDIR: Ray cannot use {folder}: {error.strerror}; {_ELSEWHERE}"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"TMPDIR: Ray cannot use {folder}: it may not be written; {_ELSEWHERE}")
    if free < _FREE_BYTES:
        raise UserError(
            f"TMPDIR: Ray needs {_FREE_BYTES / 1e6:.0f} MB for its logs in {folder}, where "
            f"{free / 1e6:.0f} MB are free; {_ELSEWHERE}"
        )


def _check_length(whose: str, folder: Path, socket: str, instead: str) -> None:
    room = _LONGEST_SOCKET - len(f"/{socket}")
    length = len(os.fsencode(folder))
    if length > room:
        raise UserError(
            f"TMPDIR: {whose} makes sockets in {folder}, whose path must not exceed {room} bytes, "
            f"got {length}; {instead} gives {whose} a shorter one"
        )


def _explain(error: Exception) -> str:
    reason = first_line(error)
    if reason.startswith("The last "):  # lines of a log follow, and what went wrong comes last
        reason = str(error).strip().splitlines()[-1].strip()
    help = f"Ray's logs are in {temporary_folder()}/session_latest/logs"
    if isinstance(error, OSError) and error.filename:
        help = _ELSEWHERE
    if "object store" in reason:
        help = "make /dev/shm larger (docker run --shm-size=4g), or free memory"
    return f"Ray cannot be started: {reason}; {help}"


T = TypeVar("T")

_SECONDS_BETWEEN_RENEWALS = 0.005

_here = threading.local()


class RayThread(ThreadPoolExecutor):
    """The one thread that starts Ray and ends it. It lives as long as the context: Linux ends
    processes of Ray with the thread that has started them."""

    def __init__(self) -> None:
        _leave_group_at_fork()
        super().__init__(1, "ray", _mark)

    def run(self, do: Callable[[], T]) -> T:
        """Return what `do` returns; the program's handlers of signals are there afterwards."""
        future = self.submit(do)
        while wait([future], _SECONDS_BETWEEN_RENEWALS).not_done:
            process.renew()
        process.renew()
        return future.result()


def _mark() -> None:
    _here.starts_ray = True


@functools.cache
def _leave_group_at_fork() -> None:
    """Let processes that the thread starts leave the process group; set once, for good."""

    def leave() -> None:  # in the new process, before it becomes the other program
        if getattr(_here, "starts_ray", False):
            os.setpgid(0, 0)

    os.register_at_fork(after_in_child=leave)


_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class AuthTokenGuard(Observer):
    """Takes the file of Ray's token from other users, for whom Ray leaves it readable.

    One that was there before is worth a note: somebody may have read it.
    """

    def __init__(self) -> None:
        """Made before Ray starts, which writes the file if there is none."""
        self._was_there = token_file().is_file()
        self._notes: list[str] = []

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def begin(self, start: RunStart) -> None:
        path = token_file()
        if not start.is_own_cluster or not path.is_file():
            return
        status = path.stat()
        if status.st_uid == os.getuid() and status.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
            if self._was_there:
                self._notes.append(
                    f"{path}, the token of Ray's clusters, was readable for other users of this "
                    "machine; it no longer is"
                )
