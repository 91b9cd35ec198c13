"""The face that a worker group shows to Ray Tune: one step is one report.

The trainable does no training. It hands the trial to the broker and waits for one report after
another; the scheduler tells the broker what it decides. Tune reuses the actor for the next trial.
What Tune takes for a trial is one *leg* of it: from its start, or from a pause, to the next pause
or to its end. Nothing of the training lives here: Tune starts an actor that is lost again, which
asks for the reports from the first one on that has no decision.
"""

from pathlib import Path
from typing import Any

import ray
from ray import tune

from nanovlm.cluster.jobs import trial_job
from nanovlm.config.space import SearchSpace
from nanovlm.files import identifier
from nanovlm.messages import Report, TrialRecord, measured

NUMBER = "number"
VALUES = "values"
IS_FINAL = "is_final"
FAILURE = "failure"
INFEASIBLE = "infeasible"
UNFINISHED = "unfinished"
SAMPLES_SEEN = "samples_seen"


class TrialRelay(tune.Trainable):
    """Passes trials of one concurrent slot from Tune to the broker."""

    def setup(  # type: ignore[override]  # tune.with_parameters gives what follows `config`
        self,
        config: dict[str, Any],
        *,
        broker: Any,
        space: SearchSpace,
        milestones: tuple[int, ...],
        folder: Path,
    ) -> None:
        self._broker = broker
        self._space = space
        self._milestones = milestones
        self._folder = folder
        self._submit(config)

    def __repr__(self) -> str:  # seen in Ray's dashboard
        return f"trials of {identifier(self._folder.name)}"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._submit(new_config)
        return True

    def step(self) -> dict[str, Any]:
        answer = ray.get(self._broker.next_report.remote(self._job.trial_id, self._num_reports))
        if isinstance(answer, TrialRecord):  # the trial has ended without another report
            return self._ending(answer)
        self._num_reports += 1
        return self._result(answer)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing of a trial is kept here; its models are in the results folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def _submit(self, config: dict[str, Any]) -> None:
        self._job = trial_job(
            self._space, self._milestones, self._folder, config[NUMBER], config[VALUES]
        )
        self._num_reports = ray.get(self._broker.submit.remote(self._job))

    def _result(self, report: Report) -> dict[str, Any]:
        wanted = [objective.metric for objective in self._space.objective.all]
        found = measured(report)
        if not found.keys() >= {*wanted}:  # the program has seen it too and ends the search
            return {"done": True, wanted[0]: float("nan"), SAMPLES_SEEN: 0, UNFINISHED: None}
        return {
            "done": report.is_final,
            **{metric: found[metric] for metric in wanted},
            SAMPLES_SEEN: report.samples_seen,
            IS_FINAL: report.is_final,
        }

    def _ending(self, record: TrialRecord) -> dict[str, Any]:
        how = FAILURE if record.state == "failed" else UNFINISHED
        return {
            "done": True,
            self._space.objective.metric: float("nan"),
            SAMPLES_SEEN: 0,
            how: record.reason,
            INFEASIBLE: record.is_infeasible,
        }
