"""Who is woken when something changes at the broker: whom it concerns, always and alone."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import pytest

from nanovlm.cluster.broker import SECONDS_BETWEEN_UPDATES, Broker
from nanovlm.messages import Assignment, Decision, End, Order, ProgressUpdate, TrialRecord
from tests.cluster.short_trials import ENDS, Driver, job, report, update

T = TypeVar("T")

NUM_GROUPS = 20


class CountingBroker(Broker):
    """Counts how often each call that waits asks for its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Counter[object]()

    async def _wait_for(self, concern: int | str | None, ask: Callable[[], T | None]) -> T:
        def counted() -> T | None:
            self.asked[concern] += 1
            return ask()

        return await super()._wait_for(concern, counted)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def working(broker: Broker) -> list[int]:
    """Let trials wait for decisions on their first reports; return their leases."""
    leases = []
    for number in range(NUM_GROUPS):
        await broker.submit(job(number))
        given = await broker.next_job(f"group-{number}")
        assert isinstance(given, Assignment)
        leases.append(given.lease)
    return leases


def test_a_decision_wakes_the_group_that_waits_for_it_and_no_other() -> None:
    async def scenario() -> None:
        broker = CountingBroker()
        leases = await working(broker)
        calls = [asyncio.create_task(broker.report(x, report(0), 1.0, 2.0)) for x in leases]
        await settle()
        broker.asked.clear()
        await broker.decide_all([("trial-3", ENDS[0], Decision.CONTINUE, None)])
        await settle()
        assert [call.done() for call in calls] == [n == 3 for n in range(NUM_GROUPS)]
        assert broker.asked == {leases[3]: 1}
        await broker.fail(leases[5], End.ERROR, "another rank has failed", 3.0)
        await settle()
        assert calls[5].done() and await calls[5] is Decision.STOP
        assert broker.asked == {leases[3]: 1, leases[5]: 1}
        await broker.close()
        assert {await call for n, call in enumerate(calls) if n != 3} == {Decision.STOP}

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_a_job_wakes_the_group_that_has_waited_longest() -> None:
    async def scenario() -> None:
        broker = Broker()
        calls = [asyncio.create_task(broker.next_job(f"group-{n}")) for n in range(3)]
        await settle()
        await broker.lose("group-0", "its controller has ended")
        assert await calls[0] is Order.SHUTDOWN
        await broker.submit(job(0))
        await settle()
        assert [call.done() for call in calls] == [True, True, False]
        calls[2].cancel()  # a call that nobody waits for takes no job
        await settle()
        await broker.submit(job(1))
        given = await broker.next_job("group-4")
        assert isinstance(given, Assignment) and given.job == job(1)

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_a_group_whose_worker_died_has_its_trial_back_before_one_that_waits() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        await broker.next_job("group-0")
        waiting = asyncio.create_task(broker.next_job("group-1"))
        await settle()
        given = await broker.next_job("group-0")
        assert isinstance(given, Assignment) and given.job == job(0)
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_what_nothing_waits_for_comes_with_what_is_awaited() -> None:
    async def scenario() -> None:
        broker = CountingBroker()
        events = asyncio.create_task(broker.next_events())
        await broker.submit(job(0))
        given = await broker.next_job("group-0")
        assert isinstance(given, Assignment)
        await settle()
        assert not events.done(), "that a trial runs is no hurry"
        began_at = time.monotonic()
        reported = asyncio.create_task(broker.report(given.lease, report(0), 1.0, 2.0))
        states = [len(e.reports) for e in await events if isinstance(e, TrialRecord)]
        assert states == [0, 0, 1] and time.monotonic() - began_at < SECONDS_BETWEEN_UPDATES / 2
        events = asyncio.create_task(broker.next_events())
        await broker.decide_all([("trial-0", ENDS[0], Decision.PAUSE, None)])
        began_at = time.monotonic()
        (paused,) = await events
        assert isinstance(paused, TrialRecord) and paused.is_paused
        assert time.monotonic() - began_at < SECONDS_BETWEEN_UPDATES / 2, "it is written at once"
        assert await reported is Decision.STOP, "its group is free"
        events = asyncio.create_task(broker.next_events())
        await broker.decide_all([("trial-0", ENDS[0], Decision.CONTINUE, None)])
        assert len(await events) == 1, "what nothing waits for comes by itself in the end"
        assert time.monotonic() - began_at > SECONDS_BETWEEN_UPDATES / 2
        events = asyncio.create_task(broker.next_events())
        assert isinstance(await broker.next_job("group-1"), Assignment)
        flushed = asyncio.create_task(broker.flush_events())
        assert len(await events) == 1, "at once, where all events are waited for"
        events = asyncio.create_task(broker.next_events())
        await flushed
        await broker.finish()
        assert await events == []

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_progress_updates_reach_the_driver_together() -> None:
    async def scenario() -> None:
        broker = Broker()
        leases = await working(broker)
        await broker.next_events()
        following = asyncio.create_task(broker.next_events())
        await settle()
        for number, lease in enumerate(leases):
            await broker.progress(lease, update(number))
        await settle()
        assert not following.done()
        events = await asyncio.wait_for(following, 50 * SECONDS_BETWEEN_UPDATES)
        assert len(events) == NUM_GROUPS
        assert all(isinstance(event, ProgressUpdate) for event in events)

    asyncio.run(asyncio.wait_for(scenario(), 20))


class Life:
    """A search, its driver and its groups, each a task that only goes on when it is answered."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.broker = Broker()
        self.driver = Driver(self.broker)
        self.num_trials = 12

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def search(self, number: int) -> None:
        """Decide on the reports of one trial; some of its pauses end at once."""
        name = f"trial-{number}"
        await self.broker.submit(job(number))
        for index in range(len(ENDS) - 1):
            answer = await self.driver.report(name, index)
            await self.pause()
            decision = self.random.choice(list(Decision))
            await self.broker.decide_all([(name, answer.samples_seen, decision, "a comparison")])
            if decision is Decision.STOP:
                return
            if decision is Decision.PAUSE:
                await self.pause()
                await self.broker.decide_all([(name, answer.samples_seen, Decision.CONTINUE, None)])

    async def work(self, group: str) -> None:
        """Take jobs until the broker closes; now and then the group is lost or dies."""
        number = 0
        while True:
            name = f"{group}-{number}"
            given = await self.broker.next_job(name, self.random.choice((0.001, 5)))
            if given is Order.SHUTDOWN:
                return
            if isinstance(given, Assignment) and not await self.train(name, given):
                number += 1

    async def train(self, group: str, given: Assignment) -> bool:
        for index in range(len(ENDS)):
            await self.pause()
            fate = self.random.random()
            if fate < 0.03:
                await self.broker.fail(given.lease, End.ERROR, "a fault", 1.0)
            elif fate < 0.06:
                await self.broker.lose(group, "its node is gone")
                return False
            elif fate < 0.09:
                return True  # its worker has died, and asks again
            if await self.broker.report(given.lease, report(index), 1.0, 2.0) is Decision.STOP:
                break
        return True

    async def run(self) -> None:
        groups = [asyncio.create_task(self.work(f"group-{n}")) for n in range(4)]
        numbers = range(self.num_trials)
        searches = [asyncio.create_task(self.search(number)) for number in numbers]
        await asyncio.gather(*(self.driver.end(f"trial-{number}") for number in numbers))
        await self.broker.flush_events()
        await self.broker.close()
        await asyncio.gather(*groups)
        await self.broker.wait_until_idle()
        await self.broker.finish()
        await self.driver.task
        for search in searches:  # those of trials that failed
            search.cancel()


@pytest.mark.parametrize("seed", range(150))
def test_nobody_sleeps_for_ever(seed: int) -> None:
    async def scenario() -> None:
        life = Life(seed)
        await life.run()
        assert sorted(r.number for r in life.driver.ended) == list(range(life.num_trials))
        assert not life.broker._waiting and not any(life.broker._sleepers.values())

    asyncio.run(asyncio.wait_for(scenario(), timeout=5))
