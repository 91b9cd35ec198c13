"""The private parts of Ray Train that the program uses: each test names what breaks when Ray
changes."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    RunningState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.state.state_actor import get_state_actor

from nanovlm.cluster import group_trainer
from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.group_trainer import GroupEnded, GroupTrainer
from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.cluster.ray_compat import start_run_records
from nanovlm.cluster.worker_group import end_groups, is_placed
from nanovlm.errors import UserError
from tests.processes import wait_until
from tests.raylets import WORKER

LOST = "a worker has ended"


@dataclass
class Fit:
    """A trainer at work in a thread."""

    trainer: GroupTrainer
    said: list[str]
    """What the trainer has said of its failure."""
    raised: list[Exception] = field(default_factory=list)
    thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._fit)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self.raised.append(error)

    def join(self) -> list[Exception]:
        assert self.thread is not None
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.raised


@contextlib.contextmanager
def fitting(folder: Path, do: Any) -> Iterator[Fit]:
    """Yield a trainer at work that has one worker, which does something."""
    said = list[str]()
    config = RunConfig(  # as that of worker groups
        name="fitting-group-0",
        storage_path=str(folder),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
    )
    scaling = ScalingConfig(resources_per_worker={"CPU": 0.1})
    with opened_broker("fitting") as broker:
        trainer = GroupTrainer(
            do, owner=broker, on_failure=said.append, scaling_config=scaling, run_config=config
        )
        fit = Fit(trainer, said)
        try:
            yield fit
        finally:
            end_groups([trainer], [], is_own_cluster=True, waits=True)
            fit.join()


def ray_processes() -> list[str]:
    found = list[str]()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(child.name())
    return [name for name in found if name.startswith("ray::")]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_trainer_has_no_process_but_its_worker_and_can_be_ended(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    """Else each group costs the driver's node 350 MiB more, and groups are never ended."""
    file = tmp_path / "begun"

    def wait() -> None:
        file.touch()
        time.sleep(600)

    start_run_records()
    assert wait_until(lambda: not any(WORKER in name for name in ray_processes()), seconds=30)
    before = len(ray_processes())
    with fitting(tmp_path, wait) as fit:
        assert wait_until(file.exists, seconds=60)
        assert is_placed(fit.trainer) and len(fit.trainer.reserved) == 1
        started = ray_processes()
        assert sum(WORKER in name for name in started) == 1
        assert not any("TrainController" in name or "Sync" in name for name in started)
        assert len(started) <= before + 2, "the broker and the worker"
        records: Any = get_state_actor()
        runs = [
            r for r in ray.get(records.get_train_runs.remote()).values() if r.end_time_ns is None
        ]
        (run,) = [each for each in runs if each.name == "fitting-group-0"]
        assert run.controller_actor_id == fit.trainer._owner._actor_id.hex()
        fit.trainer.end()
        (error,) = fit.join()
        assert isinstance(error, GroupEnded) and fit.said == []
    assert not is_placed(fit.trainer)


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_trainer_says_why_its_worker_has_failed(ray_cluster: Cluster, tmp_path: Path) -> None:
    def fail() -> None:
        raise UserError("no data")

    with fitting(tmp_path, fail) as fit:
        (error,) = fit.join()
        assert isinstance(error, WorkerGroupError)
        assert fit.said == [group_trainer.describe_failure(error)] == ["no data"]
        assert not is_placed(fit.trainer), "it frees what it had reserved"


@pytest.mark.ray
def test_a_trainer_that_was_ended_before_starts_nothing(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    """Else a group that comes up while the search ends is in Ray when Ray is shut down."""
    trainer = trainer_of()
    trainer.end()
    with pytest.raises(GroupEnded):
        trainer.fit()
    assert trainer.reserved == []


def trainer_of(**options: Any) -> Any:
    return GroupTrainer(print, owner=None, on_failure=print, **options)


def test_workers_have_the_name_of_the_run_in_the_dashboard() -> None:
    group = group_trainer._controller_class("digits-group-0", print).worker_group_cls
    assert "_worker_cls" in group._create_workers.__code__.co_names
    assert group._worker_cls.__name__ == WORKER
    assert repr(object.__new__(group._worker_cls)) == "digits-group-0"


def test_a_trainer_starts_no_actors_for_datasets_or_to_clean_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the head has two processes more for each group, and groups end 12 s later."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    trainers: list[Any] = [TorchTrainer(print), trainer_of()]
    stock, ours = ([type(c) for c in each._create_default_callbacks()] for each in trainers)
    left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
    kept = [each for each in stock if each not in left_out]
    assert len(kept) == len(stock) - 2
    assert ours == [
        *(group_trainer._RunRecords if each is StateManagerCallback else each for each in kept),
        group_trainer._FailureTeller,
    ]


def test_a_trainer_tells_no_autoscaler_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an actor that outlives the run starts, and each group waits for it."""
    scaling: Any = ScalingConfig(num_workers=3)
    stock: Any = create_scaling_policy(scaling)
    policy: Any = group_trainer._ReservedSize(scaling)
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
        (ControllerError(WorkerGroupStartupTimeoutError(1)), group_trainer.NO_ROOM),
        (
            ControllerError(RuntimeError("failed\nModuleNotFoundError: No module named 'nanovlm'")),
            "a node has no package 'nanovlm': all machines need those of requirements.lock and "
            "nanovlm itself",
        ),
        (ControllerError(OSError("x\ny")), "its workers could not start (x)"),
        (GroupEnded(group_trainer.ENDED), "its workers gave no sign of life"),
    ],
)
def test_why_a_group_ends(error: Any, reason: str) -> None:
    """Else the terminal shows pages of Ray's logs, or blames a node that was lost."""
    said = list[Exception]()
    teller = group_trainer._FailureTeller(said.append)
    teller.after_controller_state_update(RunningState(), ShuttingDownState(FinishedState()))
    teller.after_controller_state_update(RunningState(), ShuttingDownState(ErroredState(error)))
    assert [group_trainer.describe_failure(each) for each in said] == [reason]


def test_a_trainer_that_is_ended_after_its_workers_have_failed_says_why_they_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a node that lacks the data gets one group after another."""
    error, said = WorkerGroupError("", {0: UserError("no data")}), list[str]()
    trainer: Any = GroupTrainer(print, owner=None, on_failure=said.append)

    class Failing:
        _health_check_interval_s = 1.0

        def __init__(self, callbacks: list[Any], **_: Any) -> None:
            self.teller = callbacks[-1]

        async def run(self) -> None:
            failed = ShuttingDownState(ErroredState(error))
            self.teller.after_controller_state_update(RunningState(), failed)
            trainer.end()
            await asyncio.sleep(10)

    monkeypatch.setattr(group_trainer, "_controller_class", lambda *_: Failing)
    with pytest.raises(WorkerGroupError):
        trainer._initialize_and_run_controller(callbacks=trainer._create_default_callbacks())
    assert said == ["no data"]
