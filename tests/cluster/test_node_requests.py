"""What an autoscaler gets to see of trials that wait for nodes."""

from collections import Counter

import pytest
import ray
from ray.util import placement_group_table

from nanovlm.cluster.node_requests import NodeRequests
from nanovlm.cluster.ray_cluster import Cluster, num_fitting
from nanovlm.config.search_settings import TrialResources
from tests.processes import wait_until

pytestmark = pytest.mark.ray


def states() -> Counter[str]:
    return Counter(group["state"] for group in placement_group_table().values())


def test_groups_without_room_wait_as_reservations_until_they_get_it(ray_cluster: Cluster) -> None:
    before = states()
    cpus = ray.cluster_resources()["CPU"]
    too_many, fitting = TrialResources(cpus_per_worker=cpus + 1), TrialResources(workers=2)
    requests = NodeRequests(too_many)
    requests.update(3)
    assert wait_until(lambda: (states() - before)["PENDING"] == 3, seconds=10)
    assert wait_until(lambda: num_fitting(fitting) == cpus // 2, seconds=10), "nothing is taken"
    requests.update(1)
    assert wait_until(lambda: (states() - before)["PENDING"] == 1, seconds=10)
    requests.update(0)
    assert wait_until(lambda: (states() - before)["PENDING"] == 0, seconds=10)

    fulfilled = NodeRequests(fitting)
    fulfilled.update(1)
    assert wait_until(lambda: (states() - before)["CREATED"] == 1, seconds=10)
    fulfilled.update(0)
    assert wait_until(lambda: num_fitting(fitting) == cpus // 2, seconds=10), "it is handed over"
