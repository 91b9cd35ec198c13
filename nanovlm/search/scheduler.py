"""When a trial is stopped early: ASHA over milestones counted in samples seen.

The milestones are counted back from the full budget of a trial, so that the last comparison
before the end always has the same distance to it: with `rungs: 4, reduction_factor: 3` trials are
compared at 1/27, 1/9 and 1/3 of the budget, and the end is the fourth rung.
"""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from nanovlm.distributed.trainable import NUMBER, SAMPLES_SEEN
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.search.space import SearchSpace


def plan_milestones(space: SearchSpace, budget: int) -> tuple[int, ...]:
    """Return the samples seen at which trials report before the end, ascending.

    Args:
        budget: samples that a trial of full length sees.

    Raises:
        UserError: if the first milestones lie closer together than the largest batch.
    """
    if space.scheduler.name == "none":
        return ()
    rungs, factor = space.scheduler.rungs, space.scheduler.reduction_factor
    first = budget // factor ** (rungs - 1)
    largest = space.batch_sizes()[1]
    if rungs > 1 and first < largest:
        most = 1 + max(0, math.floor(math.log(budget / largest, factor)))
        raise UserError(
            f"scheduler.rungs: the first milestone must be at least one batch of {largest} "
            f"samples, but {rungs} rungs with reduction_factor {factor} put it at {first} of the "
            f"{budget} samples of a full trial; choose at most {most} rungs, or train longer"
        )
    return tuple(first * factor**rung for rung in range(rungs - 1))


def build_scheduler(space: SearchSpace, milestones: tuple[int, ...], budget: int) -> "Scheduler":
    """Return Tune's scheduler for these milestones."""
    if not milestones:
        return FIFOScheduler()
    return AshaWithReasons(
        time_attr=SAMPLES_SEEN,
        metric=space.objective.metric,
        mode=space.objective.mode,
        grace_period=milestones[0],
        reduction_factor=space.scheduler.reduction_factor,
        # Above every report, so that nothing but a comparison ends a trial early.
        max_t=max(budget, milestones[-1]) + 1,
    )


class AshaWithReasons(ASHAScheduler):
    """ASHA that says why it stopped a trial."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.reasons: dict[int, str] = {}
        """By the number of the trial."""

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        assert SAMPLES_SEEN in result and self._metric in result, f"ASHA cannot read {result}"
        rung = self._rung_reached(trial, result)
        others = dict(rung[1]) if rung else {}
        decision = super().on_trial_result(tune_controller, trial, result)
        if rung and decision == TrialScheduler.STOP:
            cutoff = self._metric_op * self._trial_info[trial.trial_id].cutoff(others)
            side = "below" if self._mode == "max" else "above"
            self.reasons[trial.config[NUMBER]] = (
                f"{self._metric} {result[self._metric]:.4g} {side} {cutoff:.4g}, "
                f"the cutoff of {len(others)} trials at {rung[0]} samples"
            )
        return decision

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Put the reports of trials that ended in an earlier run into the rungs."""
        for record in records:
            trial: Any = SimpleNamespace(trial_id=f"earlier-{record.number}")
            controller: Any = None  # ASHA does not look at it
            self.on_trial_add(controller, trial)
            for report in record.reports:
                result = {SAMPLES_SEEN: report["samples_seen"], **report["metrics"]}
                super().on_trial_result(controller, trial, result)
            self.on_trial_remove(controller, trial)

    def _rung_reached(self, trial: Trial, result: dict[str, Any]) -> tuple[int, dict] | None:
        for milestone, recorded in self._trial_info[trial.trial_id]._rungs:
            if result[SAMPLES_SEEN] >= milestone:
                return (milestone, recorded) if trial.trial_id not in recorded else None
        return None


Scheduler = AshaWithReasons | FIFOScheduler
