"""The search's side of the broker: each report reaches whoever waits for it, once."""

import asyncio
import itertools
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.broker_client import Answer, BrokerClient
from nanovlm.messages import Assignment, Decision, End, Order, Report, TrialRecord
from tests.cluster.short_trials import ENDS, job, report
from tests.records import make_record, make_update


def client_of(num_trials: int, submitted: list[Any] | None = None) -> BrokerClient:
    """Return a client with trials that were submitted to a broker which only lists them."""
    calls: list[Any] = [] if submitted is None else submitted
    client = BrokerClient(SimpleNamespace(submit=SimpleNamespace(remote=calls.append)))
    for number in range(num_trials):
        client.submit(job(number))
    return client


def saved(number: int, num_reports: int, end: End | None = None) -> TrialRecord:
    record = make_record(
        number,
        "running",
        reports=[report(index) for index in range(num_reports)],
        trial_id=f"trial-{number}",
    )
    return replace(record, end=end)


def test_each_report_is_told_once_and_the_end_after_them() -> None:
    submitted: list[Any] = []
    client = client_of(1, submitted)
    client.submit(job(0))  # its next leg
    assert submitted == [job(0)]
    client.take([saved(0, 0), make_update("trial-0", 1), saved(0, 2)])
    assert client.next_report("trial-0") == report(0)
    assert client.next_report("trial-0") == report(1)
    assert client.next_of(["trial-0"], timeout_seconds=0.01) is None
    over = saved(0, 3, End.ERROR)
    client.take([over])
    assert client.next_report("trial-0") == report(2)
    client.close()
    assert client.next_report("trial-0") == over, "what is in the folder comes before the close"


def test_a_report_wakes_whoever_waits_for_its_trial_and_nobody_else() -> None:
    client = client_of(3)
    answers = queue.SimpleQueue[tuple[str, Answer]]()

    def wait_for(trial_id: str) -> None:
        answers.put((trial_id, client.next_report(trial_id)))

    threads = [threading.Thread(target=wait_for, args=(f"trial-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    client.take([saved(1, 1)])
    assert answers.get(timeout=5) == ("trial-1", report(0))
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.05)
    client.close()
    assert sorted([answers.get(timeout=5), answers.get(timeout=5)], key=lambda a: a[0]) == [
        ("trial-0", None),
        ("trial-2", None),
    ]


def test_one_waits_for_several_trials() -> None:
    client = client_of(3)
    threading.Timer(0.05, client.take, [[saved(2, 1)]]).start()
    assert client.next_of(["trial-0", "trial-2"], timeout_seconds=5) == ("trial-2", report(0))
    began_at = time.monotonic()
    assert client.next_of(["trial-0", "trial-2"], timeout_seconds=0.05) is None
    assert time.monotonic() - began_at >= 0.05


@pytest.mark.parametrize("seed", range(20))
def test_no_report_is_lost_or_told_twice_in_threads(seed: int) -> None:
    numbers = range(8)
    client, told = client_of(len(numbers)), dict[str, list[Answer]]()

    def follow(trial_id: str) -> None:
        told[trial_id] = []
        while not told[trial_id] or isinstance(told[trial_id][-1], Report):
            told[trial_id].append(client.next_report(trial_id))

    threads = [threading.Thread(target=follow, args=(f"trial-{n}",)) for n in numbers]
    for thread in threads:
        thread.start()
    events = [(n, k) for n, k in itertools.product(numbers, range(len(ENDS) + 1))]
    order = random.Random(seed)
    order.shuffle(events)
    latest = dict.fromkeys(numbers, 0)
    for number, count in events:  # the folder may miss a state in between, and comes to the last
        if count >= latest[number]:
            latest[number] = count
            client.take([saved(number, count)])
    client.take([saved(number, len(ENDS), End.COMPLETED) for number in numbers])
    for thread in threads:
        thread.join(5)
    for number in numbers:
        *reports, last = told[f"trial-{number}"]
        assert reports == [report(index) for index in range(len(ENDS))]
        assert last == saved(number, len(ENDS), End.COMPLETED)


def group_takes_a_trial(broker: Any, num_reports: int) -> Sequence[Decision]:
    """Work on the next trial as a worker group does; return the decisions."""
    given = ray.get(broker.next_job.remote("group-0", 20))
    assert isinstance(given, Assignment), f"{Order(given)} instead of a job"
    reports = [report(index) for index in range(num_reports)]
    return [ray.get(broker.report.remote(given.lease, each, 1.0, 2.0)) for each in reports]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(60)
def test_a_trial_that_paused_in_an_earlier_run_goes_on() -> None:
    """With the broker itself: nothing is told that was decided on before."""
    paused = make_record(0, "paused", reports=[report(0)], trial_id="trial-0")
    with opened_broker("client") as broker:
        client = BrokerClient(broker)
        client.take_up(job(0), paused)
        client.decide([("trial-0", ENDS[0], Decision.CONTINUE, None)])
        client.submit(job(0))
        decisions = queue.SimpleQueue[Sequence[Decision]]()
        group = threading.Thread(target=lambda: decisions.put(group_takes_a_trial(broker, 2)))
        group.start()
        while (found := client.next_of(["trial-0"], timeout_seconds=0)) is None:
            client.take(ray.get(broker.next_events.remote()))
        assert found == ("trial-0", report(1))
        client.decide([("trial-0", ENDS[1], Decision.STOP, "below the cutoff")])
        assert decisions.get(timeout=20) == [Decision.CONTINUE, Decision.STOP]
        group.join(5)
    client.decide([("trial-0", ENDS[1], Decision.STOP, "the broker is lost, which ends the run")])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(60)
def test_decisions_are_known_before_anything_that_follows() -> None:
    """Else a search looks at its trials before the last of them have ended."""

    class SlowBroker:
        """An asyncio actor, as the broker is: a later call may be done before an earlier one."""

        def __init__(self) -> None:
            self.decided = list[str]()

        async def decide_all(self, decisions: list[tuple[Any, ...]]) -> None:
            await asyncio.sleep(0.5)
            self.decided += [trial_id for trial_id, *_ in decisions]

        async def all_decided(self) -> list[str]:
            return self.decided

    broker: Any = ray.remote(SlowBroker).options(num_cpus=0).remote()
    client = BrokerClient(broker)
    client.decide([("trial-3", ENDS[0], Decision.CONTINUE, None)])
    assert ray.get(broker.all_decided.remote()) == ["trial-3"]
    ray.kill(broker)
