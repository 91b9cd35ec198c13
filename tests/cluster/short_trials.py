"""Trials of three reports, for the tests of the broker."""

import asyncio
from collections.abc import Callable

from nanovlm.cluster.broker import Broker
from nanovlm.config.schema import TrainConfig
from nanovlm.messages import Job, ProgressUpdate, Report, TrialRecord
from tests.records import make_update

ENDS = (10, 20, 30)
"""Samples seen at the reports of a trial."""
CONFIG = TrainConfig()


def job(number: int) -> Job:
    return Job(trial_id=f"trial-{number}", number=number, config=CONFIG)


def report(index: int, value: float = 0.5) -> Report:
    return Report(
        samples_seen=ENDS[index],
        step=index,
        metrics={"mmstar_accuracy": value},
        seconds=1.0,
        is_final=index == len(ENDS) - 1,
    )


def update(number: int) -> ProgressUpdate:
    return make_update(f"trial-{number}", 1)


class Driver:
    """Takes in all events at once, as the search's driver does."""

    def __init__(self, broker: Broker) -> None:
        self.ended: list[TrialRecord] = []
        self._broker = broker
        self._records: dict[str, TrialRecord] = {}
        self._news = asyncio.Condition()
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while events := await self._broker.next_events():
            records = [event for event in events if isinstance(event, TrialRecord)]
            self.ended += [record for record in records if record.end is not None]
            async with self._news:
                self._records |= {record.trial_id: record for record in records}
                self._news.notify_all()

    async def report(self, trial_id: str, index: int) -> Report:
        """Wait for a report of a trial."""
        record = await self._record(trial_id, lambda record: len(record.reports) > index)
        return record.reports[index]

    async def end(self, trial_id: str) -> TrialRecord:
        """Wait for the end of a trial."""
        return await self._record(trial_id, lambda record: record.end is not None)

    async def _record(self, trial_id: str, fits: Callable[[TrialRecord], bool]) -> TrialRecord:
        async with self._news:
            await self._news.wait_for(
                lambda: trial_id in self._records and fits(self._records[trial_id])
            )
        return self._records[trial_id]
