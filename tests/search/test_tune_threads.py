"""Trials of Ray Tune in threads: each test names what breaks when Ray changes."""

import functools
import inspect
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.tune import tune as tune_module
from ray.tune.execution import tune_controller
from ray.tune.utils.object_cache import _ObjectCache

from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.search.tune_threads import TrialThreads, _AllKept, trials_in_threads
from tests.processes import wait_until
from tests.search.trainables import ValueTrainable

NEVER_USED = {"_actor_task_events"}
"""For the export of models."""


def test_tunes_controller_asks_for_nothing_else() -> None:
    """Else a search ends with a traceback."""
    source = inspect.getsource(tune_controller)
    asked = set(re.findall(r"self\._actor_manager\.(\w+)", source)) - NEVER_USED
    assert asked and [name for name in asked if not hasattr(TrialThreads(), name)] == []
    for name in asked:
        theirs, ours = getattr(RayActorManager, name, None), getattr(TrialThreads, name, None)
        if inspect.isfunction(theirs) and inspect.isfunction(ours):
            assert {*inspect.signature(theirs).parameters} == {*inspect.signature(ours).parameters}


class Steps:
    """A trainable that notes what is called, and where."""

    def __init__(self, name: str) -> None:
        self.said = [(name, threading.get_ident())]

    def train(self, text: str) -> list[str]:
        self.said.append((text, threading.get_ident()))
        return [name for name, _ in self.said]

    def threads(self) -> set[int]:
        return {thread for _, thread in self.said}

    def wait(self) -> None:
        time.sleep(0.2)

    def fail(self) -> None:
        raise OSError("lost")

    def stop(self) -> None:
        self.said.append(("stop", threading.get_ident()))


def events(threads: TrialThreads) -> None:
    """Pass on all that happens, until nothing does for a moment."""
    while threads.next(timeout=0.5):
        pass


def test_the_methods_of_a_trial_run_one_after_another_in_a_thread_of_its_own() -> None:
    threads, seen = TrialThreads(), list[Any]()
    actor = threads.add_actor(Steps, {"name": "made"}, None, on_start=lambda _: seen.append("on"))
    assert threads.is_actor_started(actor) and threads.num_live_actors == 1
    events(threads)
    assert seen == ["on"]
    for text in ("a", "b"):
        threads.schedule_actor_task(actor, "train", (text,), on_result=lambda *r: seen.append(r))
    threads.schedule_actor_task(actor, "threads", on_result=lambda _, found: seen.append(found))
    assert threads.num_actor_tasks == 3
    events(threads)
    assert threads.num_actor_tasks == 0
    assert seen[1:3] == [(actor, ["made", "a"]), (actor, ["made", "a", "b"])]
    assert len(seen[3]) == 1 and threading.get_ident() not in seen[3]


def test_all_results_that_are_there_are_passed_on_at_once() -> None:
    """Tune does all that it does between two calls of `next` once for them, and not for each."""
    threads, seen = TrialThreads(), list[int]()
    for number in range(5):
        threads.add_actor(Steps, {"name": "made"}, None, lambda _, n=number: seen.append(n))  # type: ignore[misc]
    assert wait_until(lambda: threads._events.qsize() == 5, seconds=10)
    assert threads.next(timeout=0) and sorted(seen) == [*range(5)]
    assert not threads.next(timeout=0)
    threads.cleanup()


def test_results_that_tune_has_dropped_are_not_passed_on() -> None:
    """Else a trial that Tune reuses gets the result of the one before."""
    threads, seen = TrialThreads(), list[Any]()
    actor = threads.add_actor(Steps, {"name": "made"}, None)
    threads.schedule_actor_task(actor, "train", ("old",), on_result=lambda *r: seen.append(r))
    threads.clear_actor_task_futures(actor)
    threads.schedule_actor_task(
        actor, "train", kwargs={"text": "new"}, on_result=lambda *r: seen.append(r)
    )
    events(threads)
    assert seen == [(actor, ["made", "old", "new"])]


@pytest.mark.parametrize("has_future", [True, False])
def test_a_trial_stops_after_what_it_does_and_its_thread_ends(has_future: bool) -> None:
    before, seen = threading.active_count(), list[Any]()
    threads = TrialThreads()
    actor = threads.add_actor(Steps, {"name": "made"}, None, on_stop=seen.append)
    events(threads)
    threads.schedule_actor_task(actor, "wait")
    future = None
    if has_future:
        future = threads.schedule_actor_task(actor, "stop", _return_future=True)
    assert threads.remove_actor(actor, stop_future=future)
    assert threads.is_actor_started(actor), "it is at work"
    events(threads)
    assert seen == [actor] and threads.num_total_actors == 0
    assert threading.active_count() == before
    assert not threads.remove_actor(actor)


def test_tune_hears_nothing_of_a_trial_that_it_removes_before_it_has_begun() -> None:
    """Else Tune looks for the trial of an actor that it has replaced by another, and fails."""
    threads, seen = TrialThreads(), list[Any]()
    actor = threads.add_actor(
        Steps, {"name": "made"}, None, on_start=seen.append, on_stop=seen.append
    )
    future = threads.schedule_actor_task(actor, "stop", _return_future=True)
    assert threads.remove_actor(actor, stop_future=future)
    events(threads)
    assert threads.num_total_actors == 0 and seen == []


def test_a_trial_is_forgotten_at_once_when_it_is_killed_and_at_the_end() -> None:
    before = threading.active_count()
    threads = TrialThreads()
    killed, other = (threads.add_actor(Steps, {"name": "made"}, None) for _ in range(2))
    threads.schedule_actor_task(killed, "fail")
    threads.schedule_actor_task(other, "fail")
    assert threads.remove_actor(killed, kill=True) and not threads.is_actor_started(killed)
    threads.cleanup()
    assert threads.num_total_actors == 0
    events(threads)  # of which none is passed on
    assert threading.active_count() == before


def test_all_trainables_that_are_free_at_the_same_time_wait_for_their_next_trials() -> None:
    """Else most threads end after one trial, and others start."""
    theirs, ours = _ObjectCache(), _AllKept()
    assert [theirs.cache_object("key", name) for name in "ab"] == [True, False]
    assert [ours.cache_object("key", name) for name in "ab"] == [True, True]
    assert ours.num_cached_objects == 2 and [*ours.flush_cached_objects()] == []
    assert ours.pop_cached_object("key") == "a"
    assert [*ours.flush_cached_objects(force_all=True)] == ["b"]
    assert not ours.has_cached_object("key") and ours.num_cached_objects == 0


def test_an_error_in_a_trial_is_raised() -> None:
    """Else Tune starts the trial again and again."""
    threads = TrialThreads()
    actor = threads.add_actor(Steps, {"name": "made"}, None)
    threads.schedule_actor_task(actor, "fail")
    with pytest.raises(OSError, match="lost"):
        events(threads)
    threads.cleanup()


class Trial(ValueTrainable):
    def __init__(self, told: str, **of_tune: Any) -> None:
        self.told = told
        super().__init__(**of_tune)

    def step(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "told": self.told,
            "process": os.getpid(),
            "thread": threading.current_thread().name,
            "done": self.iteration == 1,
        }


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_tune_runs_trials_in_this_process(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Else each slot costs the driver's node a process, and the state of all trials is written
    again and again."""
    seen = list[dict[str, Any]]()

    class Seen(tune.Callback):
        def on_trial_result(self, **info: Any) -> None:  # type: ignore[override]
            seen.append(info["result"])

    children = {child.pid for child in psutil.Process().children(recursive=True)}
    tuner = tune.Tuner(
        Trial,
        param_space={"value": tune.grid_search([*range(5)])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(tmp_path),
            callbacks=[Seen()],
            verbose=0,
        ),
    )
    with trials_in_threads(functools.partial(Trial, "told by no pickle")):
        tuner.fit()
    (state,) = (tmp_path / "trials").glob("experiment_state-*.json")
    assert json.loads(state.read_text())["trial_data"] == []
    assert sorted(each["value"] for each in seen) == sorted([*range(5)] * 2)
    assert {each["told"] for each in seen} == {"told by no pickle"}
    assert {each["process"] for each in seen} == {os.getpid()}
    assert {each["thread"] for each in seen} == {"slot-0", "slot-1"}
    new = [c for c in psutil.Process().children(recursive=True) if c.pid not in children]
    assert not any("Trial" in child.name() for child in new)
    assert tune_module.TuneController is tune_controller.TuneController
