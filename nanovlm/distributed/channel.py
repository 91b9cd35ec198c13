"""The mailbox between the search and the worker groups: jobs and decisions down, reports up.

    trainable ──submit, next_report, decide──▶ Channel ◀──next_job, report, fail── rank 0 of a group
                                                  │
                                       next_events▼ (driver: results folder, terminal)

One channel serves a whole search. Any free worker group takes the next job, so neither side knows
the other, and a group may be restarted at any time: it gets its unfinished job again, and reports
that were decided before the restart are answered from memory.
"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from nanovlm.config_files import config_values
from nanovlm.messages import Decision, End, Job, Order, Pulse, Report, TrialRecord

MAX_STARTS = 3
"""A job whose workers died so many times is given up."""

PATIENCE_SECONDS = 60.0


@dataclass
class _Trial:
    job: Job
    record: TrialRecord
    reports: list[Report] = field(default_factory=list)
    decisions: dict[int, Decision] = field(default_factory=dict)  # by samples seen
    num_starts: int = 0

    @property
    def is_running(self) -> bool:
        return self.record.state == "running"


class Channel:
    """An asyncio actor; `ray.remote(Channel)`. Each wait is one pending call, nothing polls."""

    def __init__(self) -> None:
        self._trials: dict[str, _Trial] = {}
        self._queue: deque[_Trial] = deque()
        self._serving: dict[str, _Trial] = {}  # worker group -> the trial that it works on
        self._calls: dict[str, object] = {}  # worker group -> its latest call of next_job
        self._records: list[TrialRecord] = []
        self._pulses: dict[str, Pulse] = {}  # trial id -> the latest that was not taken
        self._controllers: list[Any] = []
        self._closed = False
        self._close_reason: str | None = None
        self._finished = False
        self._is_followed = False  # someone waits in next_events, done with all before it
        self._worker_pids: list[int] = []
        self._placement_groups: dict[Any, Any] = {}  # by their ids
        self._changed = asyncio.Condition()

    # ------------------------------------------------------------------ the search's side

    async def submit(self, job: Job) -> None:
        """Queue a job for the next free worker group."""
        record = TrialRecord(
            trial_id=job.trial_id,
            number=job.number,
            kind=job.kind,
            parameters=job.parameters,
            config=config_values(job.config),
            submitted_at=time.time(),
        )
        async with self._changed:
            assert job.trial_id not in self._trials, f"trial {job.trial_id} was submitted twice"
            trial = _Trial(job, record)
            self._trials[job.trial_id] = trial
            self._queue.append(trial)
            self._records.append(record)
            self._changed.notify_all()

    async def next_report(self, trial_id: str, index: int) -> Report | TrialRecord:
        """Return the trial's report number `index`, or its record if it ended before that.

        After `close` an unfinished trial returns its record with state `running`.
        """
        trial = self._trials[trial_id]
        async with self._changed:
            await self._changed.wait_for(
                lambda: len(trial.reports) > index or not trial.is_running or self._closed
            )
        return trial.reports[index] if len(trial.reports) > index else trial.record

    async def decide(self, trial_id: str, decision: Decision) -> None:
        """Answer the trial's last report; STOP ends the trial."""
        trial = self._trials[trial_id]
        async with self._changed:
            if trial.is_running and trial.reports and not self._closed:
                trial.decisions[trial.reports[-1].samples_seen] = decision
                if decision is Decision.STOP:
                    self._end(trial, End.PRUNED, None, at=trial.record.ended_at)
            self._changed.notify_all()

    async def next_events(self) -> list[TrialRecord | Pulse]:
        """Wait for trials to change or to go on; an empty list once finished.

        Returns:
            The records of trials that have changed, in order, and the latest pulse of each trial
            that runs.
        """
        async with self._changed:
            self._is_followed = True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._records or self._pulses or self._finished)
            self._is_followed = False
            records, self._records = self._records, []
            pulses, self._pulses = self._pulses, {}
        return [*records, *pulses.values()]

    async def wait_until_told(self) -> None:
        """Wait until all records that there are now were returned by `next_events` and taken in.

        They were when the next call of `next_events` comes.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_followed and not self._records)

    async def close(self, reason: str | None = None) -> None:
        """Hand out no more jobs and interrupt running trials at their next step.

        A trial that makes its final report nevertheless is completed. With a reason, one that has
        reported ends as `stopped` for it when its worker comes back; any other stays unfinished and
        leaves no record, so that it can be run another day.
        """
        async with self._changed:
            self._closed = True
            self._close_reason = self._close_reason or reason
            self._changed.notify_all()

    async def wait_until_home(self) -> None:
        """Wait, after `close`, until no worker group is at work any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._serving)

    async def add_controller(self, controller: Any) -> None:
        """Keep the handle of a worker group's controller."""
        self._controllers.append(controller)

    async def add_worker(self, pid: int, placement_group: Any = None) -> None:
        """Keep the process id of a worker, and what of the cluster is reserved for its group."""
        self._worker_pids.append(pid)
        if placement_group is not None:
            self._placement_groups[placement_group.id] = placement_group

    async def get_worker_pids(self) -> list[int]:
        return self._worker_pids

    async def get_placement_groups(self) -> list[Any]:
        return list(self._placement_groups.values())

    async def get_controllers(self) -> list[Any]:
        return self._controllers

    async def finish(self) -> None:
        """Let `next_events` end: the workers have gone home, nothing comes any more."""
        async with self._changed:
            self._finished = True
            self._changed.notify_all()

    # ------------------------------------------------------------------ the workers' side

    async def next_job(self, group: str, patience_seconds: float = PATIENCE_SECONDS) -> Job | Order:
        """Return the group's unfinished job after a restart, else the next one.

        After `patience_seconds` without a job the group is told to ask again: its other ranks wait
        in a collective, which would take a long silence for the death of rank 0.
        """
        call = self._calls[group] = object()
        async with self._changed:
            if not self._unfinished(group) or self._closed:
                self._take_leave(self._serving.pop(group, None))
            self._changed.notify_all()  # also frees the call of a worker that has died since
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._has_answer(group, call)), patience_seconds
                )
            except TimeoutError:
                return Order.ASK_AGAIN
            if self._closed or self._calls[group] is not call:
                return Order.GO_HOME
            trial = self._unfinished(group) or self._queue.popleft()
            trial.num_starts += 1
            if trial.num_starts > MAX_STARTS:
                reason = f"its workers died {MAX_STARTS} times"
                self._end(trial, End.WORKERS_DIED, reason, at=None)
                self._changed.notify_all()
                return Order.ASK_AGAIN
            self._serving[group] = trial
            trial.record = replace(trial.record, worker_group=group)
            self._records.append(trial.record)
            self._changed.notify_all()
        return trial.job

    async def report(
        self, trial_id: str, report: Report, first_step_at: float, at: float
    ) -> Decision:
        """Hand in a report and wait for the decision on it.

        Args:
            first_step_at: end of the trial's first optimizer step, by the worker's clock.
            at: now, by the worker's clock.
        """
        trial = self._trials[trial_id]
        if not_finite := [n for n, value in report.metrics.items() if not math.isfinite(value)]:
            name = not_finite[0]
            reason = f"{name} is {report.metrics[name]} after {report.samples_seen} samples"
            await self.fail(trial_id, reason, at, End.NOT_FINITE)
            return Decision.STOP
        async with self._changed:
            if not trial.reports or report.samples_seen > trial.reports[-1].samples_seen:
                trial.reports.append(report)
                self._add_to_record(trial, report, first_step_at, at)
                if report.is_final:
                    trial.decisions[report.samples_seen] = Decision.STOP
                    self._end(trial, End.COMPLETED, None, at=at)
                else:
                    self._records.append(trial.record)
                self._changed.notify_all()
            await self._changed.wait_for(
                lambda: report.samples_seen in trial.decisions or self._closed
            )
        return trial.decisions.get(report.samples_seen, Decision.STOP)

    async def pulse(self, pulse: Pulse) -> None:
        """Take in how far a trial is; only the latest counts."""
        async with self._changed:
            if self._trials[pulse.trial_id].is_running:
                self._pulses[pulse.trial_id] = pulse
                self._changed.notify_all()

    async def fail(self, trial_id: str, reason: str, at: float, end: End = End.ERROR) -> None:
        """End the trial as failed; the first rank that says so gives the reason.

        Args:
            end: which kind of failure it is.
        """
        trial = self._trials[trial_id]
        async with self._changed:
            if trial.is_running:
                self._end(trial, end, reason, at=at)
            self._changed.notify_all()

    async def wait_until_closed(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed)

    # ------------------------------------------------------------------ inside

    def _has_answer(self, group: str, call: object) -> bool:
        """Return whether a call of `next_job` is over, for a job or because nobody listens."""
        is_stale = self._calls[group] is not call
        return self._closed or is_stale or bool(self._unfinished(group) or self._queue)

    def _take_leave(self, trial: _Trial | None) -> None:
        """End the trial of a group that comes back after the close."""
        if trial and trial.is_running and trial.reports and self._close_reason:
            self._end(trial, End.SEARCH_ENDED, self._close_reason, at=trial.record.ended_at)

    def _unfinished(self, group: str) -> _Trial | None:
        trial = self._serving.get(group)
        return trial if trial and trial.is_running else None

    @staticmethod
    def _add_to_record(trial: _Trial, report: Report, first_step_at: float, at: float) -> None:
        trial.record = replace(
            trial.record,
            reports=(*trial.record.reports, report),
            first_step_at=trial.record.first_step_at or first_step_at,
            ended_at=at,
        )

    def _end(self, trial: _Trial, end: End, reason: str | None, at: float | None) -> None:
        trial.record = trial.record.ended(end, reason, at)
        self._pulses.pop(trial.job.trial_id, None)
        self._records.append(trial.record)
