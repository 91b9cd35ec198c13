"""What an autoscaler gets to see of trials that wait for nodes."""

import contextlib
from collections.abc import Collection, Iterator

import pytest
import ray
from ray.util import placement_group_table

from nanovlm.cluster.node_requests import NodeRequests
from nanovlm.cluster.ray_cluster import Cluster, num_fitting
from nanovlm.config.search_settings import TrialResources
from tests.processes import wait_until

pytestmark = pytest.mark.ray


@contextlib.contextmanager
def requests_of(resources: TrialResources) -> Iterator[NodeRequests]:
    """Yield requests that end with the test, which others share the cluster with."""
    requests = NodeRequests(resources)
    try:
        yield requests
    finally:
        requests.update(0)


def count(state: str, before: Collection[str]) -> int:
    groups = placement_group_table().items()
    return sum(group["state"] == state for name, group in groups if name not in before)


def test_groups_without_room_wait_as_reservations_until_they_get_it(ray_cluster: Cluster) -> None:
    before = set(placement_group_table())
    cpus = int(ray.cluster_resources()["CPU"])
    one_too_large = TrialResources(cpus_per_worker=cpus + 1)
    with requests_of(one_too_large) as requests:
        requests.update(3)
        assert wait_until(lambda: count("PENDING", before) == 3, seconds=10)
        assert wait_until(lambda: num_fitting(TrialResources()) == cpus, seconds=30), "all is free"
        requests.update(1)
        assert wait_until(lambda: count("PENDING", before) == 1, seconds=10)
    assert wait_until(lambda: count("PENDING", before) == 0, seconds=10)

    with requests_of(TrialResources(workers=cpus)) as requests:
        requests.update(1)
        assert wait_until(lambda: count("CREATED", before) == 1, seconds=10)
        requests.update(0)
        assert wait_until(lambda: num_fitting(TrialResources()) == cpus, seconds=10), "handed over"
