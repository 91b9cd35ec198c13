"""The cluster that tests of lost nodes use: what it starts, loses and leaves behind."""

import json
import os
import subprocess
import sys

import pytest

from tests.processes import session_processes, wait_until
from tests.raylets import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

ASK = """
import json, logging, sys, ray
ray.init(sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
alive = {n["NodeManagerAddress"]: n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]}
print("said", json.dumps([alive, ray.util.get_node_ip_address()]))
"""


def ask(cluster: Raylets, address: str) -> tuple[dict[str, float], str]:
    """Return the CPUs of the nodes that live, by address, and on which one a program lands."""
    command = [sys.executable, "-c", ASK, address]
    environment = {**os.environ, **cluster.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alive, landed = json.loads(done.stdout.split("said ")[1].splitlines()[0])
    return alive, landed


def test_nodes_come_and_go_and_nothing_is_left() -> None:
    with Raylets(RAY_health_check_period_ms="200") as cluster:
        first, second = cluster.add_node(), cluster.add_node(num_cpus=2)
        assert ask(cluster, cluster.address) == (
            {cluster.head.address: 0, first.address: 1, second.address: 2},
            cluster.head.address,
        )
        first.kill()
        assert not first.is_alive() and second.is_alive() and cluster.head.is_alive()
        third = cluster.add_node()
        assert cluster.live_nodes() == [cluster.head, second, third]

        def is_noticed() -> bool:
            alive, _ = ask(cluster, "auto")
            return {*alive} == {cluster.head.address, second.address, third.address}

        assert wait_until(is_noticed, seconds=40)
    assert not cluster.folder.exists()
    assert [process for node in cluster.nodes for process in session_processes(node.session)] == []
