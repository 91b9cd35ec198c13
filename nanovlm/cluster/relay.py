"""The jobs of a search and how they run: under Ray Tune (`TrialRelay`), or all to their end."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from nanovlm.cluster.broker_client import BrokerClient
from nanovlm.config.space import SearchSpace
from nanovlm.messages import Decision, Job, Report, TrialRecord, measured
from nanovlm.results.read import answers_file
from nanovlm.results.retention import model_dir, state_dir

NUMBER = "number"
VALUES = "values"
IS_FINAL = "is_final"
FAILURE = "failure"
INFEASIBLE = "infeasible"
UNFINISHED = "unfinished"
SAMPLES_SEEN = "samples_seen"


def trial_id_of(number: int) -> str:
    return f"trial-{number:04d}"


def job_in(folder: Path, trial_id: str, **fields: Any) -> Job:
    """Return a job that keeps its files in the results folder, with `fields` of `Job`."""
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
    """Return the job of a search's trial that has these values of the searched keys."""
    return job_in(
        folder,
        trial_id_of(number),
        number=number,
        parameters=values,
        config=space.config_for(values),
        milestones=milestones,
    )


_SECONDS_BETWEEN_STARTS = 2.0
"""At which slots that have become free are found."""


def run_to_end(
    client: BrokerClient, next_jobs: Callable[[], Sequence[Job]], num_slots: Callable[[], int]
) -> None:
    """Run jobs without a scheduler; return when all have ended, or the run ends.

    The outcomes are in the records.

    Args:
        next_jobs: returns all jobs that may run now; called at the start, again whenever one has
            ended and `on_events` has taken that in, and when there are more slots. Those that it
            returned before are left out.
        num_slots: returns how many jobs can run at the same time; no more are submitted, so that
            the first of `next_jobs` is always the next one.
    """
    begun = set[str]()
    running = set[str]()

    def begin() -> None:
        for job in next_jobs():
            if job.trial_id not in begun and len(running) < num_slots():
                begun.add(job.trial_id)
                running.add(job.trial_id)
                client.submit(job)

    begin()
    while running:
        found = client.next_of(running, _SECONDS_BETWEEN_STARTS)
        if found is None:
            begin()
            continue
        trial_id, answer = found
        if isinstance(answer, Report):
            client.decide([(trial_id, answer.samples_seen, Decision.CONTINUE, None)])
        elif answer is not None:
            running.remove(trial_id)
            begin()
        else:
            return


def result_of(space: SearchSpace, report: Report) -> dict[str, Any]:
    """Return what Tune is told of a trial's report."""
    wanted = [objective.metric for objective in space.objective.all]
    found = measured(report)
    if not found.keys() >= {*wanted}:  # the program has seen it too and ends the search
        return {"done": True, wanted[0]: float("nan"), SAMPLES_SEEN: 0, UNFINISHED: None}
    return {
        "done": report.is_final,
        **{metric: found[metric] for metric in wanted},
        SAMPLES_SEEN: report.samples_seen,
        IS_FINAL: report.is_final,
    }


def ending_of(space: SearchSpace, record: TrialRecord | None) -> dict[str, Any]:
    """Return what Tune is told of a trial that has ended without another report; None: the run ends
    before it."""
    ending = {"done": True, space.objective.metric: float("nan"), SAMPLES_SEEN: 0}
    if record is None or record.state != "failed":
        return {**ending, UNFINISHED: None if record is None else record.reason}
    return {**ending, FAILURE: record.reason, INFEASIBLE: record.is_infeasible}


class TrialRelay(tune.Trainable):
    """Passes the trials of one slot from Tune to the broker; one step is one report.

    It does no training: it submits the trial and waits for one report after another; the scheduler
    tells the broker its decisions. Tune reuses it for the next trial. For Tune a trial is one
    *leg*: from a start or a pause to the next pause or the end.
    """

    def __init__(
        self,
        client: BrokerClient,
        space: SearchSpace,
        milestones: tuple[int, ...],
        folder: Path,
        **of_tune: Any,
    ) -> None:
        """
        Args:
            folder: the results folder.
            of_tune: what Tune gives every trainable, number and values of the trial among them.
        """
        self._client = client
        self._space = space
        self._milestones = milestones
        self._folder = folder
        super().__init__(**of_tune)

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        self._client.submit(self._job)
        answer = self._client.next_report(self._job.trial_id)
        if isinstance(answer, Report):
            return result_of(self._space, answer)
        return ending_of(self._space, answer)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing of a trial is kept here; its models are in the results folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._job = trial_job(
            self._space, self._milestones, self._folder, config[NUMBER], config[VALUES]
        )
