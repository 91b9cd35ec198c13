"""Worker groups that are still starting: they may hang, or the search may end."""

import contextlib
import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from nanovlm.cluster.broker import GroupParts, opened_broker
from nanovlm.cluster.group_trainer import GroupTrainer
from nanovlm.cluster.ray_cluster import Cluster, num_fitting
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import RayWorkerGroups, worker_groups
from nanovlm.config.search_settings import TrialResources
from tests.processes import wait_until
from tests.raylets import WORKER, send

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

LATE_SECONDS = 1.5
"""More than one round of ending takes."""


class LateTrainer(GroupTrainer):
    """Comes up a while after the search has begun to end."""

    is_ending, has_come_up = threading.Event(), threading.Event()

    def _create_default_callbacks(self) -> list[Any]:  # Ray's last step before the controller
        assert self.is_ending.wait(60)
        time.sleep(LATE_SECONDS)
        self.has_come_up.set()
        return super()._create_default_callbacks()


def test_a_group_that_comes_up_while_the_search_ends_is_ended_too(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    with opened_broker("late") as broker:

        def make_group(name: str, unfit: Collection[str]) -> GroupTrainer:
            return LateTrainer(print, owner=broker, on_failure=print)

        setup = ClusterSetup(TrialResources(), tmp_path, is_own_cluster=True)
        groups = RayWorkerGroups(1, 1, broker, setup, make_group)
        (group,) = groups._groups.values()
        LateTrainer.is_ending.set()
        groups.leave()
        assert LateTrainer.has_come_up.is_set() and not group.thread.is_alive()
        assert group.trainer.reserved == []


def workers() -> set[psutil.Process]:
    """Return the processes of all worker groups of this program's cluster."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends
            if f"ray::{WORKER}" in "".join(child.cmdline()):
                found.add(child)
    return found


def test_a_group_that_hangs_at_its_start_holds_up_no_other(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    """Ray waits without end for a worker that has begun and does not answer."""
    half = TrialResources(cpus_per_worker=ray.cluster_resources()["CPU"] / 2)
    setup = ClusterSetup(half, tmp_path / "logs", is_own_cluster=True)
    setup.log_dir.mkdir()
    assert wait_until(lambda: num_fitting(half) == 2, seconds=30), "all is free"
    before = workers()

    def begun() -> set[str]:
        groups.follow_cluster()
        found: set[str] = ray.get(broker.begun_groups.remote())
        return found

    with opened_broker("hangs") as broker, worker_groups(1, 2, broker, setup) as groups:
        assert wait_until(lambda: bool(workers() - before), seconds=30)
        (hanging,) = workers() - before
        send(hanging, signal.SIGSTOP)
        assert wait_until(lambda: begun() == {"group-1"}, seconds=60), "there is room for it"
        parts: GroupParts = ray.get(broker.parts_of.remote("group-0"))
        assert parts.workers == [], "it hangs before it says that it is there"

        ray.get(broker.lose.remote("group-0", "no sign of life"))
        groups.end_groups(ray.get(broker.take_lost.remote()))
        assert wait_until(lambda: not hanging.is_running(), seconds=10)
        assert wait_until(lambda: begun() == {"group-1", "group-2"}, seconds=60), "in its place"
