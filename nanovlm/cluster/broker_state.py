"""The states of trials: which worker group works on which, and what follows if a group is lost.

    submit ──▶ queued ──next_job──▶ working ──report──▶ deciding ──PAUSE──▶ paused ◀── take_up
               ▲  ▲                 │  │  ▲                │ │               │ │
               │  └─ lost, stalled, ┘  │  └── CONTINUE ────┘ │ STOP     STOP │ │
               │     asks for a job    │ final report, fail  ▼               │ │
               │                       └─────────────────▶ ended ◀───────────┘ │
               └─────────────────────────── CONTINUE ──────────────────────────┘

A trial belongs to no group: if its group is lost or silent, it returns to the head of the queue,
and any free group takes it up from its last report. A paused trial holds no group; it waits until
the search resumes it, in whichever group is free then, or ends it. A lease says which group has a
trial now; messages with an older lease are ignored. There is no clock, no Ray and no waiting here:
`Broker` adds them.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from nanovlm.cluster.broker_trial import BrokerTrial
from nanovlm.cluster.stalls import StallDetector
from nanovlm.config.sources import config_values
from nanovlm.messages import (
    Assignment,
    Decision,
    End,
    Job,
    Notice,
    ProgressUpdate,
    Report,
    TrialRecord,
)

MAX_STARTS = 3
"""A trial fails after so many groups in a row have worked on it without a new report."""

MOST_UPDATES = 50
"""Progress updates a second of all groups together; each group sends one a second at most."""
_UPDATES_IN_SILENCE = 10
"""That come, at least, in the time after which a silent group is lost."""

Event = TrialRecord | ProgressUpdate | Notice


class BrokerState:
    """The trials of a search: each is queued, at work in one group, paused, or has just ended."""

    def __init__(self, stall_seconds: float | None = None) -> None:
        """Lose a group after a silence of `stall_seconds`; None: see `StallDetector`."""
        self._trials: dict[str, BrokerTrial] = {}
        self._queue: deque[BrokerTrial] = deque()
        self._serving: dict[str, BrokerTrial] = {}  # worker group -> the trial that it works on
        self._leases: dict[int, str] = {}  # those that hold -> worker group
        self.answered: set[int | None] = set()
        """Leases of which `decision` may say something else; whoever has told them empties it."""
        self.stalls = StallDetector(stall_seconds)
        self._lost: set[str] = set()  # worker groups
        self._newly_lost: list[str] = []  # those that `take_lost` has not returned yet
        self._next_lease = itertools.count()
        self._events: list[TrialRecord | Notice] = []
        self._updates: dict[str, ProgressUpdate] = {}  # trial id -> the latest that was not taken
        self.is_closed = False
        self._close_reason: str | None = None
        self._is_aborted = False

    # ------------------------------------------------------------------ the search's side

    def submit(self, job: Job, at: float) -> None:
        """Queue a new job.

        Args:
            at: now, in seconds since the epoch.
        """
        record = TrialRecord(
            trial_id=job.trial_id,
            number=job.number,
            kind=job.kind,
            parameters=job.parameters,
            config=config_values(job.config),
            submitted_at=at,
        )
        trial = self._trials[job.trial_id] = BrokerTrial(job, record)
        self._queue.append(trial)
        self._events.append(record)

    def take_up(self, job: Job, record: TrialRecord) -> None:
        """Add a trial that paused in an earlier run of the program; it is paused again."""
        trial = self._trials[job.trial_id] = BrokerTrial(job, record)
        trial.decisions = {report.samples_seen: Decision.CONTINUE for report in record.reports}
        self._events.append(record)

    def decide(
        self, trial_id: str, samples_seen: int, decision: Decision, reason: str | None = None
    ) -> None:
        """Answer the last report of the trial, once, or twice if the first answer is PAUSE.

        STOP ends the trial for the reason. Whatever else is asked for changes nothing.
        """
        trial = self._trials.get(trial_id)
        if trial is None or not trial.is_open or self.is_closed:
            return
        is_paused = trial.record.is_paused
        is_open_to_it = trial.awaits_decision or (is_paused and decision is not Decision.PAUSE)
        if samples_seen != trial.record.samples_seen or not is_open_to_it:
            return
        trial.decisions[samples_seen] = decision
        self.answered.add(trial.lease)
        if decision is Decision.STOP:
            self._end(trial, End.PRUNED, reason, at=trial.record.ended_at)
        elif decision is Decision.PAUSE:
            self._pause(trial)
        elif is_paused:
            self._go_on(trial)

    def notify(self, text: str) -> None:
        """Tell the user something about the worker groups, unless the run is over."""
        if not self.is_closed:
            self._events.append(Notice(text=text))

    def abort(self, reason: str) -> None:
        """End the run, which cannot go on for a reason that is no trial's fault. Open trials stay
        unfinished, so that the run can be resumed."""
        if not self._is_aborted:
            self._is_aborted = True
            self._events.append(Notice(text=reason, ends_run=True))
        self.close(None)

    def close(self, reason: str | None) -> None:
        """Hand out no more jobs and interrupt running trials at their next step.

        With a reason, a trial that has reported ends for it, as soon as its group comes back. Any
        other stays unfinished, so that it can be run after a resume.
        """
        self.is_closed = True
        self._close_reason = self._close_reason or reason
        for trial in self._open_trials():
            if trial.lease is None:
                self._end_with_search(trial)

    def take_events(self) -> list[Event]:
        """Return the events since the last call: changed records in order, then the progress. What
        has ended is the driver's from then on."""
        events, self._events = self._events, []
        updates, self._updates = self._updates, {}
        for event in events:
            if isinstance(event, TrialRecord):
                self._trials[event.trial_id].num_reports_taken = len(event.reports)
                if event.end is not None:
                    del self._trials[event.trial_id]
        return [*events, *updates.values()]

    @property
    def has_events(self) -> bool:
        return bool(self._events or self._updates)

    @property
    def has_awaited_events(self) -> bool:
        """Whether there are events that something waits for: reports, pauses, ends and notices.

        Others, such as that a group has taken up a trial, tell only those who watch.
        """
        return any(map(self._is_awaited, self._events))

    @property
    def has_changes(self) -> bool:
        """Whether there are events other than progress updates."""
        return bool(self._events)

    # ------------------------------------------------------------------ the workers' side

    def next_job(self, group: str, now: float) -> Assignment | None:
        """Return a job for the group, None if there is none or the group may have none.

        If the group was at work, its workers were lost: its trial goes back to the queue first.

        Args:
            now: in seconds, on a clock that only goes forward.
        """
        self.come_back(group)
        if not self._queue or self.is_closed or group in self._lost:
            return None
        trial = self._queue.popleft()
        trial.num_starts += 1
        trial.num_legs_before = len(trial.record.legs)
        trial.lease = next(self._next_lease)
        self._leases[trial.lease] = group
        self._serving[group] = trial
        self.stalls.reset(group, now)
        trial.record = replace(trial.record, worker_group=group)
        self._events.append(trial.record)
        return Assignment(
            job=trial.job,
            lease=trial.lease,
            seconds_between_updates=min(
                len(self._serving) / MOST_UPDATES,
                self.stalls.limit_seconds() / _UPDATES_IN_SILENCE,
            ),
        )

    def come_back(self, group: str) -> None:
        """Take in that the group has started, or works on no trial any more."""
        self.stalls.arrive(group)
        if trial := self._serving.get(group):
            self._requeue(trial, f"{group}: a worker has ended")

    def is_lost(self, group: str) -> bool:
        return group in self._lost

    def report(
        self, lease: int, report: Report, first_step_at: float, at: float, now: float
    ) -> None:
        """Take a report in; one that was made before, by an earlier group, changes nothing.

        Args:
            first_step_at: end of the trial's first optimizer step, by the worker's clock.
            at: now, by the worker's clock.
        """
        trial = self._heard(lease, now)
        if trial is None:
            return
        is_known = trial.record.reports and report.samples_seen <= trial.record.samples_seen
        if not is_known:
            trial.extend_leg(first_step_at, at)
        for name, value in report.metrics.items():
            if not math.isfinite(value):
                reason = f"{name} is {value} after {report.samples_seen} samples"
                self._end(trial, End.NOT_FINITE, reason, at)
                return
        if is_known:
            return
        self.stalls.has_report = True
        trial.num_starts = 1
        trial.record = replace(
            trial.record,
            reports=(*trial.record.reports, report),
            first_step_at=trial.record.first_step_at or first_step_at,
            ended_at=at,
        )
        if report.is_final:
            self._end(trial, End.COMPLETED, None, at)
        else:
            self._events.append(trial.record)

    def decision(self, lease: int, samples_seen: int, now: float) -> Decision | None:
        """Return the decision on a report, None until there is one; the group's silence counts
        from `now`."""
        trial = self._serving_by(lease)
        if trial is None or self.is_closed:
            return Decision.STOP
        found = trial.decisions.get(samples_seen)
        if found is not None:
            self.stalls.reset(self._leases[lease], now)
        return found

    def progress(self, lease: int, update: ProgressUpdate, now: float) -> None:
        """Take in a trial's progress; only the latest counts."""
        if self._heard(lease, now) is not None:
            self._updates[update.trial_id] = update

    def fail(self, lease: int, end: End, reason: str, at: float) -> None:
        """End the trial as failed; the first rank that says so gives the reason."""
        trial = self._serving_by(lease)
        if trial is not None and not self._is_aborted:  # else a rank fails since another one did
            trial.extend_leg(None, at)
            self._end(trial, end, reason, at)

    def lose(self, group: str, reason: str) -> None:
        """Give a group no more jobs; its trial goes on in another one."""
        if group in self._lost:
            return
        self._lost.add(group)
        self._newly_lost.append(group)
        self.stalls.arrive(group)
        trial = self._serving.get(group)
        if trial is not None:
            self._requeue(trial, f"{group}: {reason}")
        else:
            self.notify(f"{group}: {reason}")

    def take_lost(self, now: float) -> list[str]:
        """Lose the groups that have been silent for too long; return all that were lost since the
        last call."""
        for group, limit_seconds in self.stalls.silent_groups(now).items():
            trial = self._serving.get(group)
            if trial is None or not trial.awaits_decision:
                self.lose(group, f"no sign of life for {limit_seconds / 60:.3g} minutes")
        lost, self._newly_lost = self._newly_lost, []
        return lost

    @property
    def is_idle(self) -> bool:
        return not self._serving

    # ------------------------------------------------------------------ inside

    def _is_awaited(self, event: TrialRecord | Notice) -> bool:
        if isinstance(event, Notice) or event.end is not None or event.is_paused:
            return True
        return len(event.reports) > self._trials[event.trial_id].num_reports_taken

    def _open_trials(self) -> Iterable[BrokerTrial]:
        return [trial for trial in self._trials.values() if trial.is_open]

    def _serving_by(self, lease: int) -> BrokerTrial | None:
        group = self._leases.get(lease)
        return None if group is None else self._serving[group]

    def _heard(self, lease: int, now: float) -> BrokerTrial | None:
        """Return the trial of a lease that holds; note the sign of life of its group."""
        trial = self._serving_by(lease)
        if trial is not None:
            group = self._leases[lease]
            if trial.awaits_decision:  # the group was silent because it had to wait
                self.stalls.reset(group, now)
            else:
                self.stalls.hear(group, now)
        return trial

    def _release(self, trial: BrokerTrial) -> None:
        assert trial.lease is not None, f"{trial.job.trial_id} is not at work"
        group = self._leases.pop(trial.lease)
        self.answered.add(trial.lease)
        del self._serving[group]
        self.stalls.forget(group)
        trial.lease = None
        self._updates.pop(trial.job.trial_id, None)

    def _pause(self, trial: BrokerTrial) -> None:
        """Take the trial from its group, which stops because its lease has ended."""
        if trial.lease is not None:
            self._release(trial)
        elif trial in self._queue:  # its group was lost while the search decided
            self._queue.remove(trial)
        trial.record = replace(trial.record, is_paused=True)
        self._events.append(trial.record)

    def _go_on(self, trial: BrokerTrial) -> None:
        """Queue a paused trial; starts of earlier groups no longer count."""
        trial.num_starts = 0
        trial.record = replace(trial.record, is_paused=False, worker_group=None)
        self._queue.append(trial)
        self._events.append(trial.record)

    def _end_with_search(self, trial: BrokerTrial) -> None:
        """End a trial that no group works on when the search is over, if it has a report."""
        if trial.record.reports and self._close_reason:
            self._end(trial, End.SEARCH_ENDED, self._close_reason, trial.record.ended_at)

    def _requeue(self, trial: BrokerTrial, reason: str) -> None:
        self._release(trial)
        if self.is_closed:
            self._end_with_search(trial)
        elif trial.num_starts >= MAX_STARTS:
            why = f"its workers died {MAX_STARTS} times without coming further; last {reason}"
            self._end(trial, End.WORKERS_DIED, why, at=trial.record.ended_at)
        else:
            self._queue.appendleft(trial)
            begin = "from its last report" if trial.record.reports else "from its beginning"
            text = f"{reason}; {trial.job.trial_id} goes on {begin} in a free group"
            self._events.append(Notice(text=text))

    def _end(self, trial: BrokerTrial, end: End, reason: str | None, at: float | None) -> None:
        if trial.lease is not None:
            self._release(trial)
        elif trial in self._queue:
            self._queue.remove(trial)
        trial.record = trial.record.ended(end, reason, at)
        self._events.append(trial.record)
