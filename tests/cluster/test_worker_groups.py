"""The end of worker groups that are still starting, with real actors in place of Ray Train's."""

import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import ray

from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import RayWorkerGroups
from nanovlm.config.search_settings import TrialResources

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

LATE_SECONDS = 1.5
"""More than one round of ending takes."""


class Controller:
    """Serves until it is killed, as the controller of a trainer that has work."""

    def serve(self) -> None:
        time.sleep(600)


def test_a_group_that_comes_up_while_the_search_ends_is_ended_too(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    is_ending, has_come_up = threading.Event(), threading.Event()
    with opened_broker("late") as broker:

        def run_group(name: str, unfit: Collection[str]) -> None:
            assert is_ending.wait(60)
            time.sleep(LATE_SECONDS)
            controller: Any = ray.remote(Controller).options(num_cpus=0).remote()
            served = controller.serve.remote()
            ray.get(broker.add_controller.remote(name, controller))
            has_come_up.set()
            ray.get(served)

        setup = ClusterSetup(TrialResources(), tmp_path, is_own_cluster=True)
        groups = RayWorkerGroups(1, 1, broker, setup, run_group)
        (thread,) = groups._groups.values()
        is_ending.set()
        groups.leave()
        assert has_come_up.is_set() and not thread.is_alive()
