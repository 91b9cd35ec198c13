"""The channel between search and workers, driven without Ray: it is plain asyncio."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from nanovlm.config import TrainConfig
from nanovlm.distributed.channel import MAX_STARTS, Channel
from nanovlm.messages import Decision, Job, Order, Pulse, Report, Speed, TrialRecord

SPEED = Speed(
    samples_per_second=800.0,
    answer_tokens_per_second=3000.0,
    data_wait_fraction=0.25,
    model_tflops_per_second=0.5,
    model_flops_utilization=None,
    peak_memory_gib=1.5,
)


def job(number: int) -> Job:
    return Job(trial_id=f"trial-{number}", number=number, config=TrainConfig())


def report(samples: int, is_final: bool = False) -> Report:
    return Report(
        samples_seen=samples,
        step=samples,
        metrics={"mmstar_accuracy": samples / 100},
        seconds=1.0,
        first_step_seconds=0.5,
        evaluation_seconds=0.25,
        speed=SPEED,
        is_final=is_final,
        notes=(f"note {samples}",),
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, timeout=5))


async def records(channel: Channel) -> list[TrialRecord]:
    return [event for event in await channel.next_events() if isinstance(event, TrialRecord)]


async def ended(channel: Channel) -> list[TrialRecord]:
    return [record for record in await records(channel) if record.state != "running"]


def test_a_trial_that_is_stopped_at_its_second_report() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        assert await channel.next_job("group-0") == job(0)

        async def worker() -> list[Decision]:
            first = await channel.report("trial-0", report(10), first_step_at=1.0, at=2.0)
            second = await channel.report("trial-0", report(20), first_step_at=1.0, at=3.0)
            return [first, second]

        decisions = asyncio.create_task(worker())
        assert await channel.next_report("trial-0", 0) == report(10)
        await channel.decide("trial-0", Decision.CONTINUE)
        assert await channel.next_report("trial-0", 1) == report(20)
        await channel.decide("trial-0", Decision.STOP)
        assert await decisions == [Decision.CONTINUE, Decision.STOP]
        (record,) = await ended(channel)
        assert (record.state, record.samples_seen, record.worker_group) == (
            "stopped",
            20,
            "group-0",
        )
        assert (record.first_step_at, record.ended_at) == (1.0, 3.0)
        assert [entry.samples_seen for entry in record.reports] == [10, 20]
        assert [entry.notes for entry in record.reports] == [("note 10",), ("note 20",)]

    run(scenario())


def test_the_final_report_needs_no_decision() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.next_job("group-0")
        await channel.report("trial-0", report(10, is_final=True), 1.0, 2.0)
        (record,) = await ended(channel)
        assert record.state == "completed"
        assert record.metrics == {"mmstar_accuracy": 0.1}
        (entry,) = record.reports
        assert entry == report(10, is_final=True)

    run(scenario())


def test_a_failed_trial_tells_its_reason_and_frees_the_group() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.submit(job(1))
        await channel.next_job("group-0")
        await channel.fail("trial-0", "loss is nan at step 3", at=5.0)
        await channel.fail("trial-0", "a later rank's words", at=6.0)
        answer = await channel.next_report("trial-0", 0)
        assert isinstance(answer, TrialRecord)
        assert (answer.state, answer.reason, answer.ended_at) == (
            "failed",
            "loss is nan at step 3",
            5.0,
        )
        assert await channel.next_job("group-0") == job(1)

    run(scenario())


def test_a_restarted_group_gets_its_job_again_and_known_decisions_at_once() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.next_job("group-0")
        lost = asyncio.create_task(channel.report("trial-0", report(10), 1.0, 2.0))
        await channel.next_report("trial-0", 0)
        await channel.decide("trial-0", Decision.CONTINUE)
        await lost
        # The worker dies here; its successor starts over.
        assert await channel.next_job("group-0") == job(0)
        assert await channel.report("trial-0", report(10), 7.0, 8.0) is Decision.CONTINUE
        await channel.report("trial-0", report(20, is_final=True), 7.0, 9.0)
        (record,) = await ended(channel)
        assert [entry.samples_seen for entry in record.reports] == [10, 20]

    run(scenario())


def test_a_job_that_kills_its_workers_is_given_up() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.submit(job(1))
        for _ in range(MAX_STARTS):
            assert await channel.next_job("group-0") == job(0)
        assert await channel.next_job("group-0") is Order.ASK_AGAIN
        assert await channel.next_job("group-0") == job(1)
        (record,) = await ended(channel)
        assert (record.trial_id, record.state) == ("trial-0", "failed")
        assert record.reason == "its workers died 3 times"

    run(scenario())


def test_a_job_never_goes_to_a_call_of_a_dead_worker() -> None:
    async def scenario() -> None:
        channel = Channel()
        dead = asyncio.create_task(channel.next_job("group-0"))
        await asyncio.sleep(0)
        alive = asyncio.create_task(channel.next_job("group-0"))
        assert await dead is Order.GO_HOME
        await channel.submit(job(0))
        assert await alive == job(0)

    run(scenario())


def test_two_groups_share_the_queue() -> None:
    async def scenario() -> None:
        channel = Channel()
        waiting = [asyncio.create_task(channel.next_job(f"group-{i}")) for i in range(2)]
        await asyncio.sleep(0)
        for number in range(2):
            await channel.submit(job(number))
        assert {getattr(given, "number", None) for given in await asyncio.gather(*waiting)} == {
            0,
            1,
        }

    run(scenario())


@pytest.mark.parametrize("reason", [None, "the target is reached"])
def test_closing_frees_everyone(reason: str | None) -> None:
    async def scenario() -> None:
        channel = Channel()
        for number in range(2):
            await channel.submit(job(number))
            await channel.next_job(f"group-{number}")
        idle = asyncio.create_task(channel.next_job("group-2"))
        asking = asyncio.create_task(channel.report("trial-0", report(10), 1.0, 2.0))
        closed = asyncio.create_task(channel.wait_until_closed())
        assert await channel.next_report("trial-0", 0) == report(10)
        reading = asyncio.create_task(channel.next_report("trial-0", 1))
        await asyncio.sleep(0)
        await channel.next_events()
        await channel.close(reason)
        await channel.decide("trial-0", Decision.STOP)  # Tune takes its trials down
        await closed
        assert await idle is Order.GO_HOME
        assert await asking is Decision.STOP
        answer = await reading
        assert isinstance(answer, TrialRecord)
        assert answer.state == "running"
        for number in range(2):
            assert await channel.next_job(f"group-{number}") is Order.GO_HOME
        await channel.finish()
        told = await records(channel)
        if reason is None:  # interrupted: unfinished, to go on another day
            assert told == []
        else:  # the trial without a report stays unfinished
            assert [(r.number, r.state, r.reason) for r in told] == [(0, "stopped", reason)]

    run(scenario())


def test_a_trial_that_completes_after_the_close_is_not_lost() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.next_job("group-0")
        await channel.next_events()
        await channel.close("the target is reached")
        await channel.report("trial-0", report(10, is_final=True), 1.0, 2.0)
        assert await channel.next_job("group-0") is Order.GO_HOME
        (record,) = await ended(channel)
        assert record.state == "completed"

    run(scenario())


def test_home_is_when_no_group_is_at_work() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        await channel.next_job("group-0")
        waiting = asyncio.create_task(channel.next_job("group-1"))
        await channel.close()
        home = asyncio.create_task(channel.wait_until_home())
        assert await waiting is Order.GO_HOME
        await asyncio.sleep(0.01)
        assert not home.done()
        assert await channel.next_job("group-0") is Order.GO_HOME
        await home

    run(scenario())


def test_a_group_without_a_job_asks_again_and_loses_nothing() -> None:
    async def scenario() -> None:
        channel = Channel()
        assert await channel.next_job("group-0", patience_seconds=0.01) is Order.ASK_AGAIN
        asking = asyncio.create_task(channel.next_job("group-0"))
        await asyncio.sleep(0)
        await channel.submit(job(0))
        assert await asking == job(0)

    run(scenario())


def pulse(number: int, samples: int) -> Pulse:
    return Pulse(
        trial_id=f"trial-{number}",
        stage="training",
        step=samples,
        samples_seen=samples,
        total_samples=100,
        train_loss=1.0,
        samples_per_second=2.0,
        data_wait_fraction=0.5,
    )


def test_only_the_latest_pulse_of_a_running_trial_is_told() -> None:
    async def scenario() -> None:
        channel = Channel()
        for number in range(3):
            await channel.submit(job(number))
            await channel.next_job(f"group-{number}")
        await channel.next_events()
        for number, samples in ((0, 1), (1, 1), (2, 1), (0, 2)):
            await channel.pulse(pulse(number, samples))
        await channel.fail("trial-1", "out of memory", at=1.0)
        await channel.pulse(pulse(1, 3))
        record, *pulses = await channel.next_events()
        assert isinstance(record, TrialRecord)
        assert (record.number, record.state) == (1, "failed")
        assert pulses == [pulse(0, 2), pulse(2, 1)]

    run(scenario())


def test_records_are_told_when_the_next_events_are_asked_for() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        told = asyncio.create_task(channel.wait_until_told())
        (record,) = await records(channel)
        await asyncio.sleep(0.01)
        assert not told.done()  # whoever has got it may still be at it
        following = asyncio.create_task(channel.next_events())
        await told
        await channel.finish()
        assert record.number == 0 and await following == []

    run(scenario())


def test_a_trial_is_told_before_a_group_takes_it_up() -> None:
    async def scenario() -> None:
        channel = Channel()
        await channel.submit(job(0))
        (queued,) = await records(channel)
        assert (queued.state, queued.worker_group) == ("running", None)
        await channel.next_job("group-0")
        (taken,) = await records(channel)
        assert (taken.state, taken.worker_group) == ("running", "group-0")

    run(scenario())
