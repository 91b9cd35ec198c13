"""A running set of worker groups on a Ray cluster, and its orderly end.

Ctrl-C, SIGTERM, a time limit and a reached goal all throw the switch: the broker closes, running
trials end at their next optimizer step, and the worker groups leave.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from nanovlm import process
from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.broker_client import BrokerClient
from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.ray_cluster import Cluster, connect, num_concurrent_trials
from nanovlm.cluster.ray_compat import head_answers
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import StartWorkers, WorkerGroups, worker_groups
from nanovlm.config.search_settings import TrialResources
from nanovlm.errors import RunFailed
from nanovlm.messages import Notice
from nanovlm.results.read import LOGS_DIR

INTERRUPTED = "interrupted"
LOST_BROKER = "the process between the search and its workers (Broker) is lost"

_SECONDS_BETWEEN_CHECKS = 1.0
"""Of worker groups that were lost, and of room for others."""

LOST_HEAD = "the head of the Ray cluster does not answer any more"
_SECONDS_BETWEEN_PINGS = 3.0
"""Of the head; each may take as long."""
_HEAD_SILENCE_SECONDS = 40.0
"""After which the head is lost."""

OnStart = Callable[[Cluster, int], None]
"""Called before any trial with the cluster and the number of trials that run at the same time."""

OnEvents = Callable[[Sequence[Event]], None]
"""Called in another thread with all that has happened since the last call, in its order: records of
trials that have changed, progress updates and notices. The search hears of a record after this
returns."""


class StopSwitch:
    """Ends a run from any thread or signal; the first reason counts."""

    def __init__(
        self, limit_seconds: float | None = None, limit_reason: str = "the time limit is reached"
    ) -> None:
        self.reason: str | None = None
        self.error: Exception | None = None
        """Why the run had to end, if an error has thrown the switch."""
        self._limit_reason = limit_reason
        self._thrown = threading.Event()
        self._deadline = None if limit_seconds is None else time.monotonic() + limit_seconds

    def __reduce__(self) -> tuple[type["StopSwitch"], tuple[()]]:
        return StopSwitch, ()  # Tune pickles what it is given into a state that nobody reads

    def stop(self, reason: str) -> None:
        if not self._thrown.is_set():
            self.reason = reason
            self._thrown.set()

    def fail(self, error: Exception) -> None:
        """End the run, which then raises the error; trials stay unfinished."""
        if not self._thrown.is_set():
            self.error = error
            self.stop(str(error))

    def pause(self, seconds: float) -> None:
        """Wait, but no longer once the switch is thrown."""
        self._thrown.wait(seconds)

    def release(self) -> None:
        """Let `wait` return without a reason: the run is over."""
        self._thrown.set()

    def is_thrown(self) -> bool:
        return self._thrown.is_set()

    def lift_limit(self) -> None:
        """Drop the time limit: what it limits is done."""
        self._deadline = None

    def wait(self) -> None:
        """Return when the switch is thrown, which it is when the time is over."""
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if not self._thrown.wait(left):
            if self._deadline is None:  # it was lifted meanwhile
                self._thrown.wait()
            else:
                self.stop(self._limit_reason)


@dataclass(frozen=True)
class WorkerPool:
    """Worker groups at work."""

    client: BrokerClient
    concurrency: int
    """Trials that could run at the same time when it started."""
    num_slots: Callable[[], int]
    """Returns how many trials can run at the same time now."""
    flush_events: Callable[[], None]
    """Returns when `on_events` has taken in all events up to now."""


@contextlib.contextmanager
def worker_pool(
    address: str | None,
    resources: TrialResources,
    concurrency: int | None,
    max_concurrency: int | None,
    folder: Path,
    switch: StopSwitch,
    on_start: OnStart,
    on_events: OnEvents,
    start_workers: StartWorkers = worker_groups,
    check: NodeCheck | None = None,
) -> Iterator[WorkerPool]:
    """Join or start Ray and run worker groups for as long as the context lasts.

    Args:
        address: of a Ray cluster to join; None starts one, which ends with the context.
        resources: what one trial occupies.
        concurrency: trials that run at the same time; None takes what fits on the cluster, at most
            `max_concurrency`.
        folder: the results folder, made by `on_start`; logs go there.
        start_workers: starts the worker groups.
        check: what the machines of a cluster that is joined must have in common with this one.

    Raises:
        UserError: if the cluster cannot run that many trials, or none.
        RunFailed: if all worker groups have ended although there was work, the broker is lost, or
            a worker ends the run.
        KeyboardInterrupt: by a signal, before anything has begun.
    """
    stall_minutes = resources.stall_minutes
    stall_seconds = None if stall_minutes is None else 60 * stall_minutes
    with _stopped_by_signals(switch), connect(address) as cluster:
        _raise_if_interrupted(switch)
        fitting = num_concurrent_trials(resources, concurrency, cluster.is_own)
        first = min(fitting, max_concurrency or fitting)
        limits = [first] if cluster.is_own else [concurrency, max_concurrency]
        most = min((limit for limit in limits if limit is not None), default=None)
        asks = concurrency is not None and not cluster.is_own
        check = None if cluster.is_own else check
        setup = ClusterSetup(resources, folder / LOGS_DIR, cluster.is_own, check, asks)
        on_start(cluster, max(1, first))
        with (
            opened_broker(folder.name, stall_seconds) as broker,
            _events_passed_on(broker, client := BrokerClient(broker), on_events, switch) as flush,
            start_workers(first, most, broker, setup) as groups,
            _closed_on_stop(broker, client, switch),
            _groups_watched(broker, groups, switch),
            _head_watched(),
        ):
            yield WorkerPool(client, max(1, first), groups.num_slots, flush)
        if switch.error is not None:
            raise switch.error


@contextlib.contextmanager
def _stopped_by_signals(switch: StopSwitch) -> Iterator[None]:
    """Let a signal end the run in order."""
    with process.in_order(lambda: switch.stop(INTERRUPTED)):
        _raise_if_interrupted(switch)
        yield


def _raise_if_interrupted(switch: StopSwitch) -> None:
    """Nothing has begun that would have to end in order."""
    if switch.reason == INTERRUPTED:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _in_thread(
    name: str, watch: Callable[[], None], finish: Callable[[], None]
) -> Iterator[threading.Thread]:
    """Run `watch` in a thread meanwhile; it returns after `finish`, and then the context ends.

    The broker may be lost at any moment, which ends `watch` and is left to `_events_passed_on`.
    """

    def watch_broker() -> None:
        with contextlib.suppress(RayActorError):
            watch()

    thread = threading.Thread(target=watch_broker, name=name, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        with contextlib.suppress(RayActorError):
            finish()
        thread.join()


@contextlib.contextmanager
def _events_passed_on(
    broker: Any, client: BrokerClient, on_events: OnEvents, switch: StopSwitch
) -> Iterator[Callable[[], None]]:
    """Pass every event on until the last worker has gone home; yield `WorkerPool.flush_events`."""
    errors: list[Exception] = []

    def follow() -> None:
        try:
            while events := ray.get(broker.next_events.remote()):
                ends = [e for e in events if isinstance(e, Notice) and e.ends_run]
                on_events([event for event in events if event not in ends])
                client.take(events)
                for notice in ends:
                    switch.fail(RunFailed(notice.text))
        except RayActorError:
            errors.append(RunFailed(LOST_BROKER))
            switch.stop(LOST_BROKER)
        except Exception as error:
            errors.append(error)
            switch.fail(error)  # what is not recorded has to be run again

    def flush_events() -> None:
        flushed = broker.flush_events.remote()
        while thread.is_alive() and not ray.wait([flushed], timeout=1)[0]:
            pass  # an error of `on_events` ends the thread

    try:
        with _in_thread("events", follow, lambda: ray.get(broker.finish.remote())) as thread:
            yield flush_events
    finally:
        if errors:  # whatever else went wrong, this is why
            raise errors[0]


@contextlib.contextmanager
def _closed_on_stop(broker: Any, client: BrokerClient, switch: StopSwitch) -> Iterator[None]:
    """Close broker and client as soon as the switch is thrown, or the run is over."""

    def close() -> None:
        switch.wait()
        client.close()
        # A run that was interrupted or failed is to be resumed; any other has stopped its trials.
        is_over = switch.reason != INTERRUPTED and switch.error is None
        ray.get(broker.close.remote(switch.reason if is_over else None))

    with _in_thread("stop-switch", close, switch.release):
        yield


@contextlib.contextmanager
def _groups_watched(broker: Any, groups: WorkerGroups, switch: StopSwitch) -> Iterator[None]:
    """End worker groups that were lost, and let others start where there is room; throw the switch
    if no group is left though there is work."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_SECONDS_BETWEEN_CHECKS):
            groups.end_groups(ray.get(broker.take_lost.remote()))
            if not switch.is_thrown():
                try:
                    groups.follow_cluster()
                except RunFailed as error:
                    switch.fail(error)

    with _in_thread("groups", watch, finished.set):
        yield


@contextlib.contextmanager
def _head_watched() -> Iterator[None]:
    """End the program in order if the head of the cluster is lost: all other calls of Ray, such as
    those that the main thread waits for, would never return."""
    finished = threading.Event()

    def watch() -> None:
        heard_at = time.monotonic()
        while not finished.wait(_SECONDS_BETWEEN_PINGS):
            if head_answers(_SECONDS_BETWEEN_PINGS):
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > _HEAD_SILENCE_SECONDS:
                process.abandon(RunFailed(LOST_HEAD))
                return

    with _in_thread("head", watch, finished.set):
        yield
