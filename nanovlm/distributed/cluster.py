"""The Ray cluster: join one or start one, and what fits on it."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from nanovlm.distributed.ray_start import start_ray
from nanovlm.distributed.ray_thread import RayThread
from nanovlm.errors import UserError
from nanovlm.search.sections import TrialResources

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the user's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the results folder has its own records
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the workers through the channel
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # short trials are meant
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less for each worker group
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


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Join the cluster at `address` (`auto`: the one on this machine), or start one if None.

    A cluster that was started here ends with the context; one that was joined stays as it was. A
    process that is connected already, by its own `ray.init`, stays with its cluster.

    Raises:
        UserError: if there is no cluster at `address`, Ray cannot be started, or this process is
            connected to another cluster.
    """
    os.environ |= {key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()}
    if ray.is_initialized():
        yield _connected_before(address)
        return
    with RayThread() as thread:
        try:
            url = thread.run(lambda: start_ray(address)).dashboard_url
            yield Cluster(dashboard_url=f"http://{url}" if url else None, is_own=address is None)
        finally:
            thread.run(ray.shutdown)


def _connected_before(address: str | None) -> Cluster:
    """Return the cluster that this process has been connected to before."""
    present = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", present):
        raise UserError(
            f"address: this process is connected to the Ray cluster at {present} and cannot join "
            f"{address!r} too; `ray.shutdown()` leaves it"
        )
    dashboard = ray.init(ignore_reinit_error=True).dashboard_url  # tells, and changes nothing
    return Cluster(dashboard_url=f"http://{dashboard}" if dashboard else None, is_own=False)


def num_concurrent_trials(resources: TrialResources, wanted: int | None) -> int:
    """Return how many trials fit at once on what is free on the cluster, at most `wanted`.

    Raises:
        UserError: if not one trial fits, or fewer than `wanted`; gives need and stock.
    """
    need = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    free = available_resources_per_node().values()
    num_workers = sum(
        min(math.floor(node.get(kind, 0) / amount) for kind, amount in need.items() if amount)
        for node in free
    )
    fits = num_workers // resources.workers
    if fits >= (wanted or 1):
        return wanted or fits
    what = f"{wanted} trials at once need" if wanted and fits else "one trial needs"
    factor = resources.workers * (wanted if wanted and fits else 1)
    have = ray.cluster_resources()
    stock = " and ".join(
        f"{have.get(kind, 0):g} {kind}s ({sum(node.get(kind, 0) for node in free):g} free)"
        for kind in need
    )
    raise UserError(
        f"resources: {what} {need['CPU'] * factor:g} CPUs and {need['GPU'] * factor:g} GPUs "
        f"({resources.workers} workers of {need['CPU']:g} CPUs and {need['GPU']:g} GPUs a trial), "
        f"but the cluster has {stock}"
    )
