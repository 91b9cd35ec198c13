"""The mailbox between the search and the worker groups: jobs and decisions down, reports up.

    search ──submit, decide_all──▶           ◀──next_job──────── rank 0 of a worker group
                                   Broker   ◀──report, fail────
                                      │
                          next_events ▼
       driver: results folder, then `BrokerClient`, which tells the search, and whoever watches

One broker serves a whole search. `BrokerState` has the states of the trials and the rules; the
broker makes callers wait for what they ask. The search gets a report only after the driver has
written it to the results folder, so no decision rests on what a crash could lose.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanovlm.cluster.broker_state import BrokerState, Event
from nanovlm.files import identifier
from nanovlm.messages import (
    Assignment,
    Decision,
    End,
    Job,
    Order,
    ProgressUpdate,
    Report,
    TrialRecord,
)

T = TypeVar("T")

PATIENCE_SECONDS = 60.0

_MAX_WAITING_CALLS = 10_000
"""A few for each trial that runs."""
SECONDS_BETWEEN_UPDATES = 0.2
SECONDS_BETWEEN_BATCHES = 0.005
"""Of events that are passed on to the driver. What comes alone is passed on at once."""

_Concern = int | str | None
"""What a call waits for news of: a lease, or one of these."""
_ANY, _CLOSED = "anything", "the close"


@dataclass
class GroupParts:
    """The processes of a worker group."""

    workers: list[tuple[int, float]] = field(default_factory=list)
    """Process ids, with the times at which the processes began: ids are used again."""
    nodes: set[str] = field(default_factory=set)
    """Ids of the nodes of the workers."""
    num_workers: int | None = None
    """That it has when it has started; None: unknown."""


class Broker:
    """An asyncio actor; `ray.remote(Broker)`. Each wait is one pending call, nothing polls.

    Methods named as those of `BrokerState` do the same and wake the calls that it concerns, and no
    others: hundreds of groups wait at the same time.
    """

    def __init__(self, stall_seconds: float | None = None) -> None:
        self._state = BrokerState(stall_seconds)
        self._waiting: dict[str, asyncio.Future[Assignment | Order]] = {}
        """Calls of next_job, by worker group, in their order; none waits while a job is queued."""
        self._have_asked: set[str] = set()  # worker groups, for a job
        self._sleepers: dict[_Concern, list[asyncio.Future[None]]] = {}  # all other calls
        self._parts: dict[str, GroupParts] = {}  # by worker group
        self._passing_on: asyncio.TimerHandle | None = None  # events that nothing waits for
        self._passed_on_at = -math.inf
        self._is_due = False  # they are to be passed on
        self._finished = False
        self._is_followed = False  # the driver waits in next_events, done with all before it

    def _change(self, change: Callable[[], T]) -> T:
        """Change something, hand out the jobs that are queued now and wake whom it concerns."""
        result = change()
        while self._waiting and (given := self._job_for(group := next(iter(self._waiting)))):
            self._answer(group, given)
        self._wake(*self._sleepers if self._state.is_closed else (*self._state.answered, _ANY))
        self._state.answered.clear()
        if self._state.has_events:
            self._pass_on_soon()
        return result

    def _job_for(self, group: str) -> Assignment | Order | None:
        if self._state.is_closed or self._state.is_lost(group):
            return Order.SHUTDOWN
        return self._state.next_job(group, time.monotonic())

    def _answer(self, group: str, given: Assignment | Order) -> None:
        """End a group's call of next_job, if there is one."""
        call = self._waiting.pop(group, None)
        if call is not None and not call.done():
            call.set_result(given)

    async def _wait_for(self, concern: _Concern, ask: Callable[[], T | None]) -> T:
        """Return the first answer that is not None."""
        while (answer := ask()) is None:
            await self._sleep(concern)
        return answer

    async def _sleep(self, concern: _Concern) -> None:
        """Return when something has changed that concerns the caller."""
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers.setdefault(concern, []).append(sleeper)
        await sleeper

    def _wake(self, *concerns: _Concern) -> None:
        for concern in concerns:
            for sleeper in self._sleepers.pop(concern, ()):
                if not sleeper.done():
                    sleeper.set_result(None)

    # ------------------------------------------------------------------ the search's side

    async def submit(self, job: Job) -> None:
        self._change(lambda: self._state.submit(job, time.time()))

    async def take_up(self, job: Job, record: TrialRecord) -> None:
        self._change(lambda: self._state.take_up(job, record))

    async def decide_all(self, decisions: Sequence[tuple[str, int, Decision, str | None]]) -> None:
        """Do what `BrokerState.decide` does with each of these arguments."""

        def decide() -> None:
            for decision in decisions:
                self._state.decide(*decision)

        self._change(decide)

    async def close(self, reason: str | None = None) -> None:
        self._change(lambda: self._state.close(reason))

    # ------------------------------------------------------------------ the driver's side

    async def next_events(self) -> list[Event]:
        """Wait for events; an empty list once finished.

        The next call says that they are in the results folder. Events that nothing waits for come
        with others, or a fifth of a second later.
        """
        self._is_followed = True
        self._wake(_ANY)
        while not (self._state.has_awaited_events or self._is_due or self._finished):
            await self._sleep(_ANY)
        passed_at = self._passed_on_at + SECONDS_BETWEEN_BATCHES
        await asyncio.sleep(max(0.0, passed_at - time.monotonic()))
        self._passed_on_at = time.monotonic()
        events, self._is_due = self._state.take_events(), False
        self._is_followed = False
        return events

    async def flush_events(self) -> None:
        """Wait until all events up to now are in the results folder."""
        self._pass_on()
        await self._wait_for(
            _ANY, lambda: (self._is_followed and not self._state.has_changes) or None
        )

    async def lose(self, group: str, reason: str) -> bool:
        """Give a worker group no more jobs; return whether it had ever asked for one."""
        self._change(lambda: self._state.lose(group, reason))
        self._answer(group, Order.SHUTDOWN)
        return group in self._have_asked

    async def take_lost(self) -> list[str]:
        return self._change(lambda: self._state.take_lost(time.monotonic()))

    async def notify(self, text: str) -> None:
        self._change(lambda: self._state.notify(text))

    async def expect(self, group: str, num_workers: int) -> None:
        """Take in that a worker group starts; it is lost if not all workers are there in time."""
        (await self.parts_of(group)).num_workers = num_workers
        self._state.stalls.expect(group, time.monotonic())

    async def begun_groups(self) -> set[str]:
        """Return the worker groups that have ever asked for a job."""
        return set(self._have_asked)

    async def wait_until_idle(self) -> None:
        """Wait, after `close`, until no worker group is at work any more."""
        await self._wait_for(_ANY, lambda: self._state.is_idle or None)

    async def parts_of(self, group: str) -> GroupParts:
        return self._parts.setdefault(group, GroupParts())

    async def finish(self) -> None:
        """Let `next_events` end: all workers have left."""
        self._finished = True
        self._wake(_ANY)

    # ------------------------------------------------------------------ the workers' side

    async def add_worker(self, group: str, node: str, pid: int, began_at: float) -> None:
        parts = await self.parts_of(group)
        parts.nodes.add(node)
        parts.workers.append((pid, began_at))
        if len(parts.workers) == parts.num_workers:
            # What comes before its first job has no limit: data that is not there is prepared.
            self._state.stalls.arrive(group)

    async def next_job(
        self, group: str, patience_seconds: float = PATIENCE_SECONDS
    ) -> Assignment | Order:
        """Return the next job, first the one that the group had when its workers died.

        After `patience_seconds` without a job it returns RETRY: the other ranks of the group wait
        in a collective, which would take a long silence for the death of rank 0.
        """

        def ask() -> Assignment | Order | None:
            self._state.come_back(group)
            return self._job_for(group)

        self._have_asked.add(group)
        self._answer(group, Order.SHUTDOWN)  # a call of a worker of the group that has died since
        if given := self._change(ask):
            return given
        loop = asyncio.get_running_loop()
        call = self._waiting[group] = loop.create_future()
        retry = loop.call_later(patience_seconds, self._answer, group, Order.RETRY)
        try:
            return await call
        finally:
            retry.cancel()
            if self._waiting.get(group) is call:  # the call was cancelled
                del self._waiting[group]

    async def report(self, lease: int, report: Report, first_step_at: float, at: float) -> Decision:
        """Hand in a report and wait for the decision on it; times are of the worker's clock."""
        now = time.monotonic()
        self._change(lambda: self._state.report(lease, report, first_step_at, at, now))
        return await self._wait_for(
            lease, lambda: self._state.decision(lease, report.samples_seen, time.monotonic())
        )

    async def progress(self, lease: int, update: ProgressUpdate) -> None:
        """Take in a trial's progress, which concerns the driver alone: it gets all updates of a
        fifth of a second together."""
        self._state.progress(lease, update, time.monotonic())
        self._pass_on_soon()

    def _pass_on_soon(self) -> None:
        if self._passing_on is None:
            loop = asyncio.get_running_loop()
            self._passing_on = loop.call_later(SECONDS_BETWEEN_UPDATES, self._pass_on)

    def _pass_on(self) -> None:
        self._passing_on, self._is_due = None, self._state.has_events
        self._wake(_ANY)

    async def fail(self, lease: int, end: End, reason: str, at: float) -> None:
        self._change(lambda: self._state.fail(lease, end, reason, at))

    async def abort(self, reason: str) -> None:
        self._change(lambda: self._state.abort(reason))

    async def wait_until_closed(self) -> None:
        await self._wait_for(_CLOSED, lambda: self._state.is_closed or None)


@contextlib.contextmanager
def opened_broker(run_name: str, stall_seconds: float | None = None) -> Iterator[Any]:
    """Yield the handle of a new Broker actor, which bears the run's name and ends with the context.

    Names of actors are unique within one program on a cluster, so runs of the same name do not
    meet. The actor runs on this program's node, so that it is lost only with that node.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker: Any = (
        ray.remote(Broker)
        .options(
            name=f"nanovlm-broker-{identifier(run_name)}",
            num_cpus=0,
            max_concurrency=_MAX_WAITING_CALLS,
            scheduling_strategy=here,
        )
        .remote(stall_seconds)
    )
    try:
        yield broker
    finally:
        ray.kill(broker)
