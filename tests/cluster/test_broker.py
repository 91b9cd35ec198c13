"""The broker between search and workers, driven without Ray: it is plain asyncio."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from nanovlm.cluster.broker import Broker
from nanovlm.config.schema import TrainConfig
from nanovlm.messages import (
    Assignment,
    Decision,
    End,
    Job,
    Notice,
    Order,
    ProgressUpdate,
    Report,
    TrialRecord,
)
from tests.cluster.short_trials import Driver
from tests.records import make_record, make_update


def job(number: int) -> Job:
    return Job(trial_id=f"trial-{number}", number=number, config=TrainConfig())


def report(samples: int, is_final: bool = False) -> Report:
    return Report(
        samples_seen=samples,
        step=samples,
        metrics={"mmstar_accuracy": samples / 100},
        seconds=1.0,
        is_final=is_final,
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, timeout=5))


async def records(broker: Broker) -> list[TrialRecord]:
    return [event for event in await broker.next_events() if isinstance(event, TrialRecord)]


async def ended(broker: Broker) -> list[TrialRecord]:
    return [record for record in await records(broker) if record.end is not None]


async def take(broker: Broker, group: str) -> Assignment:
    given = await broker.next_job(group)
    assert isinstance(given, Assignment)
    return given


def test_a_trial_that_is_stopped_at_its_second_report() -> None:
    async def scenario() -> None:
        broker = Broker()
        driver = Driver(broker)
        await broker.submit(job(0))
        given = await take(broker, "group-0")
        assert given.job == job(0)

        async def worker() -> list[Decision]:
            first = await broker.report(given.lease, report(10), first_step_at=1.0, at=2.0)
            second = await broker.report(given.lease, report(20), first_step_at=1.0, at=3.0)
            return [first, second]

        decisions = asyncio.create_task(worker())
        assert await driver.report("trial-0", 0) == report(10)
        await broker.decide_all([("trial-0", 10, Decision.CONTINUE, None)])
        assert await driver.report("trial-0", 1) == report(20)
        await broker.decide_all([("trial-0", 20, Decision.STOP, "below the cutoff")])
        assert await decisions == [Decision.CONTINUE, Decision.STOP]
        await broker.flush_events()
        (record,) = driver.ended
        assert (record.end, record.reason) == (End.PRUNED, "below the cutoff")
        assert (record.samples_seen, record.worker_group) == (20, "group-0")
        assert (record.first_step_at, record.ended_at) == (1.0, 3.0)
        assert record.reports == (report(10), report(20))

    run(scenario())


def test_no_decision_on_a_final_report_is_waited_for() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        given = await take(broker, "group-0")
        assert await broker.report(given.lease, report(10, True), 1.0, 2.0) is Decision.STOP
        (record,) = await ended(broker)
        assert (record.end, record.reports) == (End.COMPLETED, (report(10, True),))

    run(scenario())


def test_a_failed_trial_tells_its_reason_and_frees_the_group() -> None:
    async def scenario() -> None:
        broker = Broker()
        driver = Driver(broker)
        await broker.submit(job(0))
        await broker.submit(job(1))
        lease = (await take(broker, "group-0")).lease
        await broker.fail(lease, End.NOT_FINITE, "loss is nan at step 3", at=5.0)
        await broker.fail(lease, End.ERROR, "a later rank's words", at=6.0)
        answer = await driver.end("trial-0")
        assert (answer.end, answer.reason) == (End.NOT_FINITE, "loss is nan at step 3")
        assert answer.ended_at == 5.0
        assert (await take(broker, "group-0")).job == job(1)

    run(scenario())


def test_a_restarted_group_gets_its_job_again_and_known_decisions_at_once() -> None:
    async def scenario() -> None:
        broker = Broker()
        driver = Driver(broker)
        await broker.submit(job(0))
        first = await take(broker, "group-0")
        lost = asyncio.create_task(broker.report(first.lease, report(10), 1.0, 2.0))
        await driver.report("trial-0", 0)
        await broker.decide_all([("trial-0", 10, Decision.CONTINUE, None)])
        await lost
        # The worker dies here; its successor starts over.
        again = await take(broker, "group-0")
        assert again.job == job(0)
        assert await broker.report(again.lease, report(10), 7.0, 8.0) is Decision.CONTINUE
        await broker.report(again.lease, report(20, is_final=True), 7.0, 9.0)
        await broker.flush_events()
        (record,) = driver.ended
        assert [entry.samples_seen for entry in record.reports] == [10, 20]

    run(scenario())


def test_a_lost_group_s_trial_goes_to_one_that_waits() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        await take(broker, "group-0")
        waiting = asyncio.create_task(take(broker, "group-1"))
        await asyncio.sleep(0)
        assert await broker.lose("group-0", "its controller has ended")
        assert (await waiting).job == job(0)
        assert await broker.next_job("group-0") is Order.SHUTDOWN
        assert not await broker.lose("group-2", "it could not start")  # never asked for a job
        (notice, last) = [e for e in await broker.next_events() if isinstance(e, Notice)]
        assert notice.text.startswith("group-0: its controller has ended; trial-0 goes on from its")
        assert last.text == "group-2: it could not start"

    run(scenario())


def test_a_job_never_goes_to_a_call_of_a_dead_worker() -> None:
    async def scenario() -> None:
        broker = Broker()
        dead = asyncio.create_task(broker.next_job("group-0"))
        await asyncio.sleep(0)
        alive = asyncio.create_task(take(broker, "group-0"))
        assert await dead is Order.SHUTDOWN
        await broker.submit(job(0))
        assert (await alive).job == job(0)

    run(scenario())


def test_two_groups_share_the_queue() -> None:
    async def scenario() -> None:
        broker = Broker()
        waiting = [asyncio.create_task(take(broker, f"group-{i}")) for i in range(2)]
        await asyncio.sleep(0)
        for number in range(2):
            await broker.submit(job(number))
        assert {given.job.number for given in await asyncio.gather(*waiting)} == {0, 1}

    run(scenario())


@pytest.mark.parametrize("reason", [None, "the target is reached"])
def test_closing_frees_everyone(reason: str | None) -> None:
    async def scenario() -> None:
        broker = Broker()
        driver = Driver(broker)
        for number in range(2):
            await broker.submit(job(number))
        leases = [(await take(broker, f"group-{number}")).lease for number in range(2)]
        idle = asyncio.create_task(broker.next_job("group-2"))
        asking = asyncio.create_task(broker.report(leases[0], report(10), 1.0, 2.0))
        closed = asyncio.create_task(broker.wait_until_closed())
        assert await driver.report("trial-0", 0) == report(10)
        await broker.close(reason)
        await broker.decide_all([("trial-0", 10, Decision.STOP, None)])  # too late
        await closed
        assert await idle is Order.SHUTDOWN
        assert await asking is Decision.STOP
        home = asyncio.create_task(broker.wait_until_idle())
        await asyncio.sleep(0.01)
        assert not home.done()
        for number in range(2):
            assert await broker.next_job(f"group-{number}") is Order.SHUTDOWN
        await home
        await broker.finish()
        await driver.task
        told = [(r.number, r.end, r.reason) for r in driver.ended]
        # Interrupted, or without a report, it stays unfinished, to go on another day.
        assert told == ([] if reason is None else [(0, End.SEARCH_ENDED, reason)])

    run(scenario())


def test_a_pause_frees_the_group_and_the_trial_goes_on_when_it_is_told() -> None:
    async def scenario() -> None:
        broker = Broker()
        driver = Driver(broker)
        await broker.submit(job(0))
        lease = (await take(broker, "group-0")).lease
        asking = asyncio.create_task(broker.report(lease, report(10), 1.0, 2.0))
        assert await driver.report("trial-0", 0) == report(10)
        await broker.decide_all([("trial-0", 10, Decision.PAUSE, None)])
        assert await asking is Decision.STOP
        waiting = asyncio.create_task(take(broker, "group-0"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await broker.decide_all([("trial-0", 10, Decision.CONTINUE, None)])
        lease = (await waiting).lease
        assert await broker.report(lease, report(10), 3.0, 4.0) is Decision.CONTINUE
        await broker.report(lease, report(20, is_final=True), 3.0, 5.0)
        assert await driver.report("trial-0", 1) == report(20, is_final=True)

    run(scenario())


def test_a_trial_that_paused_before_the_program_started_is_taken_up() -> None:
    async def scenario() -> None:
        broker = Broker()
        before = make_record(0, "paused", reports=[report(10)], trial_id="trial-0")
        await broker.take_up(job(0), before)
        assert await records(broker) == [before]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(take(broker, "group-0"), 0.01)
        await broker.decide_all([("trial-0", 10, Decision.CONTINUE, None)])
        assert (await take(broker, "group-0")).job == job(0)

    run(scenario())


@pytest.mark.parametrize("reason", [None, "budget.hours: 1 hours have passed"])
def test_a_paused_trial_ends_with_the_search_unless_it_is_interrupted(reason: str | None) -> None:
    async def scenario() -> None:
        broker = Broker()
        before = make_record(0, "paused", reports=[report(10)], trial_id="trial-0")
        await broker.take_up(job(0), before)
        assert await records(broker) == [before]
        await broker.close(reason)
        await broker.notify("too late")
        closing = [] if reason is None else [before.ended(End.SEARCH_ENDED, reason, None)]
        await broker.finish()
        assert await broker.next_events() == closing
        await broker.wait_until_idle()

    run(scenario())


def test_a_trial_that_completes_after_the_close_is_not_lost() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        lease = (await take(broker, "group-0")).lease
        await broker.next_events()
        await broker.close("the target is reached")
        await broker.report(lease, report(10, is_final=True), 1.0, 2.0)
        assert await broker.next_job("group-0") is Order.SHUTDOWN
        (record,) = await ended(broker)
        assert record.state == "completed"

    run(scenario())


def test_a_group_without_a_job_asks_again_and_loses_nothing() -> None:
    async def scenario() -> None:
        broker = Broker()
        assert await broker.next_job("group-0", patience_seconds=0.01) is Order.RETRY
        asking = asyncio.create_task(take(broker, "group-0"))
        await asyncio.sleep(0)
        await broker.submit(job(0))
        assert (await asking).job == job(0)

    run(scenario())


def update(number: int, samples: int) -> ProgressUpdate:
    return make_update(f"trial-{number}", samples)


def test_only_the_latest_pulse_of_a_running_trial_is_told() -> None:
    async def scenario() -> None:
        broker = Broker()
        for number in range(3):
            await broker.submit(job(number))
        leases = [(await take(broker, f"group-{number}")).lease for number in range(3)]
        await broker.next_events()
        for number, samples in ((0, 1), (1, 1), (2, 1), (0, 2)):
            await broker.progress(leases[number], update(number, samples))
        await broker.fail(leases[1], End.OUT_OF_MEMORY, "out of memory", at=1.0)
        await broker.progress(leases[1], update(1, 3))
        record, *updates = await broker.next_events()
        assert isinstance(record, TrialRecord)
        assert (record.number, record.state) == (1, "failed")
        assert updates == [update(0, 2), update(2, 1)]

    run(scenario())


def test_events_are_flushed_when_the_next_ones_are_asked_for() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        told = asyncio.create_task(broker.flush_events())
        (record,) = await records(broker)
        await asyncio.sleep(0.01)
        assert not told.done()  # whoever has got it may still be at it
        following = asyncio.create_task(broker.next_events())
        await told
        await broker.finish()
        assert record.number == 0 and await following == []

    run(scenario())


def test_a_trial_is_told_before_a_group_takes_it_up() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.submit(job(0))
        (queued,) = await records(broker)
        assert (queued.state, queued.worker_group) == ("running", None)
        await broker.next_job("group-0")
        (taken,) = await records(broker)
        assert (taken.state, taken.worker_group) == ("running", "group-0")

    run(scenario())


def test_a_group_has_started_when_all_its_workers_are_there() -> None:
    """From then on they may prepare data, for hours."""

    async def scenario() -> None:
        broker = Broker()
        for group in ("whole", "half"):
            await broker.expect(group, num_workers=2)
            await broker.add_worker(group, "node", pid=1, began_at=0.0)
        await broker.add_worker("whole", "node", pid=2, began_at=0.0)
        assert await broker.take_lost() == []
        assert broker._state.take_lost(time.monotonic() + 1e6) == ["half"]
        assert await broker.begun_groups() == set()

    run(scenario())
