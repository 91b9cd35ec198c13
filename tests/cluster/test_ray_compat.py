"""The private parts of Ray that the program uses: each test names what breaks when Ray changes."""

import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray._private import services
from ray._private import worker as ray_driver
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
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
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    RunningState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2._internal.state.state_actor import get_state_actor

from nanovlm.cluster import ray_compat
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.errors import UserError
from nanovlm.results import folder

LOST = "a worker has ended"


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


def test_the_controller_calls_the_hook_and_workers_take_their_class_from_the_group() -> None:
    """Else groups that hang are never ended, and workers have no name in the dashboard."""
    methods = {name for name in vars(ray_compat.ControllerHook) if not name.startswith("_")}
    assert methods == {"after_controller_start", "after_controller_state_update"}
    assert methods <= vars(ControllerCallback).keys()
    assert WorkerGroup._worker_cls is RayTrainWorker
    assert "_worker_cls" in WorkerGroup._create_workers.__code__.co_names
    shown = ray_compat.shown_as("digits-group-0", RayTrainWorker)
    assert issubclass(shown, RayTrainWorker) and shown.__name__ == "RayTrainWorker"
    assert repr(object.__new__(shown)) == "digits-group-0"


def test_the_hook_hears_of_what_a_worker_group_reserves(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a group that hangs at its start keeps others from free nodes."""
    monkeypatch.setattr(WorkerGroup, "_create_placement_group", WorkerGroup._create_placement_group)
    assert "_create_placement_group" in WorkerGroup._start_impl.__code__.co_names
    told = list[Any]()
    ray_compat._tell_reservations(told.append)
    wanted: Any = SimpleNamespace(
        resources_per_worker={"CPU": 0.01}, num_workers=2, placement_strategy="PACK",
        label_selector=None,
    )  # fmt: skip
    scaling: Any = ScalingConfig()
    handle = WorkerGroup._create_placement_group(Mock(), scaling, wanted)
    try:
        assert told == [handle.placement_group] and handle.placement_group.bundle_count == 2
    finally:
        handle.shutdown()


def test_a_trainer_starts_no_actors_for_datasets_or_to_clean_up() -> None:
    """Else the head has two processes more for each group, and groups end 12 s later."""
    trainers: list[Any] = [TorchTrainer(print), ray_compat.GroupTrainer(print)]
    stock, ours = ([type(c) for c in each._create_default_callbacks()] for each in trainers)
    left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
    assert [each for each in stock if each not in left_out] == ours
    assert len(ours) == len(stock) - 2


def test_a_trainer_tells_no_autoscaler_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an actor that outlives the run starts, and each group waits for it."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        TorchTrainer, "_initialize_and_run_controller", lambda _, **k: given.update(k)
    )
    scaling: Any = ScalingConfig(num_workers=3)
    trainer: Any = ray_compat.GroupTrainer(print, scaling_config=scaling)
    trainer._initialize_and_run_controller(scaling_policy=create_scaling_policy(scaling), other=1)
    policy = given.pop("scaling_policy")
    assert given == {"other": 1}
    stock: Any = create_scaling_policy(scaling)
    assert type(policy).__bases__ == (type(stock),)
    for each in (stock, policy):
        monkeypatch.setattr(each, "_send_resource_request", Mock())
        each.after_controller_start(SimpleNamespace(run_id="1"))
    assert stock._send_resource_request.called and not policy._send_resource_request.called
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    policy._cancel_resource_request()
    assert policy._coordinator_client is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WorkerGroupError("", {0: WorkerHealthCheckFailedError("", ActorDiedError())}), LOST),
        (WorkerGroupError("", {0: WorkerHealthCheckTimeoutError("")}), LOST),
        (
            WorkerGroupError("", {0: WorkerHealthCheckTimeoutError(""), 1: UserError("no data")}),
            "no data",
        ),
        (ControllerError(WorkerGroupStartupTimeoutError(1)), ray_compat.NO_ROOM),
        (
            ControllerError(RuntimeError("failed\nModuleNotFoundError: No module named 'nanovlm'")),
            "a node has no package 'nanovlm': all machines need those of requirements.lock and "
            "nanovlm itself",
        ),
        (ControllerError(OSError("x\ny")), "its workers could not start (x)"),
    ],
)
def test_why_a_group_ends(error: Any, reason: str) -> None:
    """Else the terminal shows pages of Ray's logs, or blames a node that was lost."""
    said = list[str]()
    hook = ray_compat.ControllerHook("run", print, print, said.append)
    hook.after_controller_state_update(RunningState(), ShuttingDownState(FinishedState()))
    hook.after_controller_state_update(RunningState(), ShuttingDownState(ErroredState(error)))
    assert said == [reason]


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
    ((node, free),) = ray_compat.free_resources().items()
    assert 0 < free["CPU"] <= ray.cluster_resources()["CPU"]
    assert ray.nodes()[0]["Labels"]["ray.io/node-id"] == node


@pytest.mark.ray
def test_the_actor_that_keeps_the_records_of_runs(ray_cluster: Cluster) -> None:
    """Else each worker group starts a second later."""
    ray_compat.start_run_records()
    assert get_state_actor() is not None
