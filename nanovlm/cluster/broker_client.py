"""The search's side of the broker, in the driver's process.

The driver takes all events from the broker, writes them to the results folder and then shows them
to the client (`worker_pool`). So the search hears of a report when it is in the folder, from here,
and no message goes back and forth for it.
"""

import contextlib
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from nanovlm.cluster.broker_state import Event
from nanovlm.messages import Decision, Job, Report, TrialRecord

TrialDecision = tuple[str, int, Decision, str | None]
"""Id of a trial, samples seen at the report that it answers, the decision, and its reason."""

Answer = Report | TrialRecord | None
"""A report, the record of a trial that has ended without another one, None if the run ends first.
"""


@dataclass
class _Trial:
    num_passed_on: int = 0
    """Reports that the search has heard of."""
    record: TrialRecord | None = None
    """As it is in the results folder."""

    def next_answer(self) -> Answer:
        """Return what the search has not heard of, None if there is nothing yet."""
        if self.record is None:
            return None
        if len(self.record.reports) > self.num_passed_on:
            self.num_passed_on += 1
            return self.record.reports[self.num_passed_on - 1]
        return self.record if self.record.end is not None else None


class BrokerClient:
    """Submits trials, waits for their reports and answers them; its methods are for any thread."""

    def __init__(self, broker: Any) -> None:
        """
        Args:
            broker: handle of the `Broker` actor.
        """
        self._broker = broker
        self._trials: dict[str, _Trial] = {}
        self._waiting: dict[str, threading.Event] = {}  # who waits for news of a trial
        self._is_closed = False
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Queue a job, unless it is known: then the trial has paused, and `decide` resumes it."""
        with self._lock:
            if job.trial_id in self._trials:
                return
            self._trials[job.trial_id] = _Trial()
        self._broker.submit.remote(job)

    def take_up(self, job: Job, record: TrialRecord) -> None:
        """Add a trial that paused in an earlier run of the program."""
        with self._lock:
            self._trials[job.trial_id] = _Trial(len(record.reports))
        ray.get(self._broker.take_up.remote(job, record))

    def next_report(self, trial_id: str) -> Answer:
        """Wait for a trial's next report; each is returned once."""
        found = self.next_of([trial_id])
        assert found is not None, "it waits without a limit"
        return found[1]

    def next_of(
        self, trial_ids: Collection[str], timeout_seconds: float | None = None
    ) -> tuple[str, Answer] | None:
        """Wait for the next report of any of these trials, which nobody else waits for; return it
        with the trial's id, or None if there is none in time."""
        news = threading.Event()
        with self._lock:
            self._waiting |= dict.fromkeys(trial_ids, news)
        try:
            while True:
                news.clear()
                if (found := self._answer_to(trial_ids)) is not None:
                    return found
                if not news.wait(timeout_seconds):
                    return None
        finally:
            with self._lock:
                for trial_id in trial_ids:
                    del self._waiting[trial_id]

    def decide(self, decisions: Sequence[TrialDecision]) -> None:
        """Answer reports; returns when the broker has done it, since calls of several threads may
        overtake each other."""
        with contextlib.suppress(RayActorError):  # the broker is lost, which ends the run elsewhere
            ray.get(self._broker.decide_all.remote(decisions))

    # ------------------------------------------------------------------ the driver's side

    def take(self, events: Iterable[Event]) -> None:
        """Take in what is in the results folder now."""
        with self._lock:
            for event in events:
                if isinstance(event, TrialRecord):
                    self._trials[event.trial_id].record = event
                    if waiting := self._waiting.get(event.trial_id):
                        waiting.set()

    def close(self) -> None:
        """Let nobody wait any more: the run ends."""
        with self._lock:
            self._is_closed = True
            for waiting in self._waiting.values():
                waiting.set()

    def _answer_to(self, trial_ids: Collection[str]) -> tuple[str, Answer] | None:
        with self._lock:
            for trial_id in trial_ids:
                if (answer := self._trials[trial_id].next_answer()) is not None:
                    return trial_id, answer
            return (next(iter(trial_ids)), None) if self._is_closed else None
