"""The private parts of Ray that the program uses: each test names what breaks when Ray changes."""

import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import services
from ray._private import worker as ray_driver
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.train.v2._internal.state.state_actor import get_state_actor

from nanovlm.cluster import ray_compat
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.results import folder
from tests.processes import wait_until


def test_where_ray_makes_its_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a path that is too long, or a full disk, fails in Ray with pages of logs."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/elsewhere")
    assert str(ray_compat.temporary_folder()) == "/tmp/elsewhere/ray"
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/tmp/here")
    assert str(ray_compat.temporary_folder()) == "/tmp/here/ray"


def test_own_clusters_are_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all ports of a cluster of its own are open to other machines."""
    monkeypatch.setattr(ray_driver, "_global_node", None)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "10.0.0.1")
    with ray_compat.on_loopback():
        assert ray.util.get_node_ip_address() == "127.0.0.1"
    if sys.platform == "linux":
        assert ray.util.get_node_ip_address() == "10.0.0.1"


@pytest.mark.ray
def test_the_nodes_of_this_machine(ray_cluster: Cluster) -> None:
    """Else `--address auto` finds no cluster, or that of another user."""
    present = ray.get_runtime_context().gcs_address
    assert ray_compat.LocalNode(present, os.getuid()) in ray_compat.local_nodes()


def test_the_cluster_of_the_last_ray_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `--address auto` cannot choose among several."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_compat.last_started_cluster() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert ray_compat.last_started_cluster() == "10.0.0.1:6379"


class Subscriber:
    """Has one message of a cluster, and then has lost the cluster."""

    def __init__(self) -> None:
        self.messages = [(None, {"job_id": None, "error_message": "a worker died\nof old age"})]

    def subscribe(self) -> None:
        pass

    def poll(self) -> Any:
        if not self.messages:
            raise ConnectionError("the cluster is gone")
        return self.messages.pop()


def test_what_ray_prints_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else Ray's messages tear the tables on the terminal, and the log lacks them."""
    job = SimpleNamespace(binary=lambda: b"1")
    worker: Any = SimpleNamespace(gcs_error_subscriber=Subscriber(), current_job_id=job)
    before = ray_driver.print_to_stdstream
    with ray_compat.prints_logged(logging.getLogger("test")):
        ray_driver.listen_error_messages(worker, threading.Event())
    assert ("test", logging.WARNING, "raylet: a worker died\nof old age") in caplog.record_tuples
    assert "died" not in "".join(capsys.readouterr())
    assert ray_driver.print_to_stdstream is before


def test_how_a_program_knows_that_it_is_a_job() -> None:
    """Else its results go where Ray removes them."""
    assert folder.IN_RAY_JOB == RAY_JOB_CONFIG_JSON_ENV_VAR


def test_records_of_runs_that_a_user_has_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    monkeypatch.setattr(ray_compat, "get_or_create_state_actor", lambda: pytest.fail("started"))
    ray_compat.start_run_records()


@pytest.mark.ray
def test_what_is_free_on_the_nodes(ray_cluster: Cluster) -> None:
    """Else too many trials start, and wait for each other for ever."""
    node = ray.nodes()[0]["Labels"]["ray.io/node-id"]
    cpus = ray.cluster_resources()["CPU"]

    def free() -> float:  # a kind of which nothing is free is left out
        return ray_compat.free_resources()[node].get("CPU", 0)

    assert wait_until(lambda: free() == cpus, seconds=30), "tests before this one let all go"
    group = ray.util.placement_group([{"CPU": 1}])
    try:
        assert group.wait(30)
        assert wait_until(lambda: free() == cpus - 1, seconds=30)
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.ray
def test_the_actor_that_keeps_the_records_of_runs(ray_cluster: Cluster) -> None:
    """Else each worker group starts a second later."""
    ray_compat.start_run_records()
    assert get_state_actor() is not None
