"""Runs jobs to their end through a channel, without anyone who decides between their reports."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from nanovlm.messages import Decision, Job, Report


def run_to_end(channel: Any, next_jobs: Callable[[], Sequence[Job]]) -> None:
    """Submit jobs and return when they have ended, or when the channel has closed.

    As many run at once as there are worker groups. What becomes of each is in its records.

    Args:
        next_jobs: returns all jobs that may run now; asked at the start, and again whenever one has
            ended and `on_event` has taken that in. Those that it returned before are left out.
    """
    begun = set[str]()
    waiting = dict[Any, tuple[str, int]]()  # for the report of a job with this index

    def begin() -> None:
        for job in next_jobs():
            if job.trial_id not in begun:
                begun.add(job.trial_id)
                ray.get(channel.submit.remote(job))
                waiting[channel.next_report.remote(job.trial_id, 0)] = job.trial_id, 0

    begin()
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting))
        trial_id, index = waiting.pop(ready)
        answer = ray.get(ready)
        if isinstance(answer, Report):
            ray.get(channel.decide.remote(trial_id, answer.samples_seen, Decision.CONTINUE))
            waiting[channel.next_report.remote(trial_id, index + 1)] = trial_id, index + 1
        elif answer.state != "running":  # else the channel has closed
            begin()
