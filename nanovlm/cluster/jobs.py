"""The jobs of a search: how they are made, and how they run where nobody decides on reports."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from nanovlm.config.space import SearchSpace
from nanovlm.messages import Decision, Job, Report
from nanovlm.results.read import answers_file
from nanovlm.results.retention import model_dir, state_dir


def trial_id_of(number: int) -> str:
    """Return the id of a search's trial."""
    return f"trial-{number:04d}"


def job_in(folder: Path, trial_id: str, **fields: Any) -> Job:
    """Return a job that keeps its files in the results folder.

    Args:
        fields: the other fields of the job.
    """
    return Job(
        trial_id=trial_id,
        output_dir=str(model_dir(folder, trial_id)),
        state_dir=str(state_dir(folder, trial_id)),
        answers_file=str(answers_file(folder, trial_id)),
        **fields,
    )


def trial_job(
    space: SearchSpace,
    milestones: tuple[int, ...],
    folder: Path,
    number: int,
    values: Mapping[str, Any],
) -> Job:
    """Return the job of a search's trial, which keeps its files in the results folder."""
    return job_in(
        folder,
        trial_id_of(number),
        number=number,
        parameters=values,
        config=space.config_for(values),
        milestones=milestones,
    )


def run_to_end(broker: Any, next_jobs: Callable[[], Sequence[Job]], concurrency: int) -> None:
    """Submit jobs and return when they have ended, or when the broker has closed.

    What becomes of each is in its records.

    Args:
        next_jobs: returns all jobs that may run now; asked at the start, and again whenever one has
            ended and `on_event` has taken that in. Those that it returned before are left out.
        concurrency: so many run at once; no more are submitted, so that the first of `next_jobs` is
            always the next one.
    """
    begun = set[str]()
    waiting = dict[Any, tuple[str, int]]()  # for the report of a job with this index

    def begin() -> None:
        for job in next_jobs():
            if job.trial_id not in begun and len(waiting) < concurrency:
                begun.add(job.trial_id)
                ray.get(broker.submit.remote(job))
                waiting[broker.next_report.remote(job.trial_id, 0)] = job.trial_id, 0

    begin()
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting))
        trial_id, index = waiting.pop(ready)
        answer = ray.get(ready)
        if isinstance(answer, Report):
            ray.get(broker.decide.remote(trial_id, answer.samples_seen, Decision.CONTINUE))
            waiting[broker.next_report.remote(trial_id, index + 1)] = trial_id, index + 1
        elif answer.end is not None:  # else the broker has closed
            begin()
