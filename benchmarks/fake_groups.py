"""Worker groups that train nothing: coroutines of one actor, which talk to the broker as real ones.

with fake_groups(load, pool) ...      # the `start_workers` of a search
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import StartWorkers
from nanovlm.messages import Assignment, Decision, Order, ProgressUpdate, Report, Speed

METRIC = "mmstar_accuracy"
ENDS = (1000, 3000, 9000, 27000)
"""Samples seen at the reports of a trial."""


@dataclass(frozen=True)
class Figures:
    """What the fake groups have seen."""

    num_reports: int
    to_decision: list[float]
    """Seconds, of the reports that were decided on since the last call."""
    num_updates: int


class FakeGroups:
    """An actor with all worker groups; each is a coroutine."""

    def __init__(self, broker: Any, seconds_between_reports: float) -> None:
        self._broker = broker
        self._seconds = seconds_between_reports
        self._random = random.Random(0)
        self._reported: dict[str, int] = {}  # what would be in the states on the disk
        self._num_reports = self._num_updates = 0
        self._to_decision: list[float] = []

    async def figures(self) -> Figures:
        known, self._to_decision = self._to_decision, []
        return Figures(self._num_reports, known, self._num_updates)

    async def serve(self, num_groups: int) -> None:
        await asyncio.gather(*(self._serve(f"group-{n}") for n in range(num_groups)))

    async def _serve(self, group: str) -> None:
        closed = self._broker.wait_until_closed.remote()
        while True:
            given: Assignment | Order = await self._broker.next_job.remote(group)
            if given is Order.SHUTDOWN:
                break
            if isinstance(given, Assignment):
                await self._train(given)
        await closed

    async def _train(self, given: Assignment) -> None:
        job, lease, began_at = given.job, given.lease, time.time()
        quality = random.Random(job.number).random()
        for index, samples in enumerate(ENDS):
            is_new = index >= self._reported.get(job.trial_id, 0)
            if is_new:
                await self._make_progress(given, samples)
                self._reported[job.trial_id] = index + 1
                self._num_reports += 1
            noise = random.Random(samples + job.number).random()
            report = make_report(samples, 0.9 * quality + 0.1 * noise)
            handed_in = time.perf_counter()
            decision = await self._broker.report.remote(lease, report, began_at, time.time())
            if is_new and not report.is_final:
                self._to_decision.append(time.perf_counter() - handed_in)
            if decision is Decision.STOP:
                return

    async def _make_progress(self, given: Assignment, samples: int) -> None:
        """Take as long as the training up to a report would take."""
        left = self._seconds * (0.5 + self._random.random())
        between = max(1.0, given.seconds_between_updates)
        while left > between:
            await asyncio.sleep(between)
            left -= between
            update = ProgressUpdate(
                trial_id=given.job.trial_id,
                stage="training",
                step=samples,
                samples_seen=samples,
                total_samples=ENDS[-1],
                train_loss=1.0,
                samples_per_second=100.0,
                data_wait_fraction=0.0,
            )
            self._broker.progress.remote(given.lease, update)
            self._num_updates += 1
        await asyncio.sleep(left)


def make_report(samples: int, value: float) -> Report:
    """Return a report as large as those of real trials are."""
    others = {f"mmstar_capability_{index}": value for index in range(6)}
    speed = Speed(
        samples_per_second=100.0,
        answer_tokens_per_second=400.0,
        data_wait_fraction=0.01,
        model_tflops_per_second=0.5,
        model_flops_utilization=None,
        peak_memory_gib=1.5,
    )
    return Report(
        samples_seen=samples,
        step=samples,
        metrics={METRIC: value, "mmstar_num_items": 1500.0, "train_loss": 1.0, **others},
        seconds=float(samples),
        speed=speed,
        is_final=samples == ENDS[-1],
    )


class FakePool:
    """The worker groups of a run, as `nanovlm.cluster.worker_group.WorkerGroups`."""

    def __init__(self, actor: Any, num_groups: int) -> None:
        self.actor = actor
        self._num_groups = num_groups

    def num_slots(self) -> int:
        return self._num_groups

    def follow_cluster(self) -> None:
        """There are as many as there were."""

    def end_groups(self, names: Sequence[str]) -> None:
        assert not names, f"{names} gave no sign of life"


def fake_groups(load: float | None, pools: list[FakePool]) -> StartWorkers:
    """Return the `start_workers` of a search.

    Args:
        load: reports a second that all groups offer together; None: as fast as it goes.
        pools: receives the running ones.
    """

    @contextlib.contextmanager
    def start(
        num_groups: int, most: int | None, broker: Any, setup: ClusterSetup
    ) -> Iterator[FakePool]:
        seconds = 0.0 if load is None else num_groups / load
        options = {"num_cpus": 0, "max_concurrency": 2 * num_groups + 10}
        actor: Any = ray.remote(FakeGroups).options(**options).remote(broker, seconds)
        served = actor.serve.remote(num_groups)
        pools.append(FakePool(actor, num_groups))
        yield pools[-1]
        ray.get(broker.close.remote())
        ray.get(served)
        ray.kill(actor)

    return start
