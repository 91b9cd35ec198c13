"""Runs jobs to their end through a channel, without anyone who decides between their reports."""

from collections.abc import Sequence
from typing import Any

import ray

from nanovlm.messages import Decision, Job, Report


def run_to_end(channel: Any, jobs: Sequence[Job]) -> None:
    """Submit the jobs and return when they have ended, or when the channel has closed.

    As many run at once as there are worker groups. What becomes of each is in its records.
    """
    for job in jobs:
        ray.get(channel.submit.remote(job))
    waiting = {channel.next_report.remote(job.trial_id, 0): (job.trial_id, 0) for job in jobs}
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting))
        trial_id, index = waiting.pop(ready)
        answer = ray.get(ready)
        if isinstance(answer, Report):
            ray.get(channel.decide.remote(trial_id, answer.samples_seen, Decision.CONTINUE))
            waiting[channel.next_report.remote(trial_id, index + 1)] = (trial_id, index + 1)
