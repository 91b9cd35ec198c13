"""When a trial is stopped early: at milestones counted in samples seen, by the rungs' rules.

The milestones are counted back from the full budget of a trial, so that the last comparison
before the end always has the same distance to it: with `rungs: 4, reduction_factor: 3` trials are
compared at 1/27, 1/9 and 1/3 of the budget, and the end is the fourth rung.
"""

import math
from collections.abc import Callable
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from nanovlm.cluster.relay import (
    FAILURE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    UNFINISHED,
)
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.pruning.successive_halving import SuccessiveHalving
from nanovlm.results.decisions import PruningDecision


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


OnDecision = Callable[[PruningDecision], None]
OnFailure = Callable[[Exception], None]


def _raise(error: Exception) -> None:
    raise error


class RungScheduler(FIFOScheduler):
    """Lets the rungs decide: `asha`, `hyperband` and `pasha`.

    A trial that pauses ends for Tune, which hears of it again when it goes on (`StudySearch`).
    Tune's own classes lose their rungs when a search goes on after an interruption, keep the values
    of trials that failed later, and draw brackets that differ from run to run.
    """

    def __init__(
        self,
        rungs: SuccessiveHalving,
        on_decision: OnDecision = lambda decision: None,
        on_failure: OnFailure = _raise,
    ) -> None:
        """
        Args:
            on_decision: told of each decision when it is safe in the folder.
            on_failure: told why a decision could not be written; nothing is decided then. Tune
                would take the error for the trial's.
        """
        super().__init__()
        self._on_failure = on_failure
        self.rungs = rungs
        self._on_decision = on_decision

    def __reduce__(self) -> tuple[type[FIFOScheduler], tuple[()]]:
        return FIFOScheduler, ()  # Tune pickles it into a state that nobody reads

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        if FAILURE in result or UNFINISHED in result or result.get(IS_FINAL):
            return TrialScheduler.CONTINUE
        number, samples_seen = trial.config[NUMBER], result[SAMPLES_SEEN]
        try:
            values = self.rungs.objective.values_in(result)
            decision = self.rungs.decide(number, samples_seen, *values)
        except OSError as error:
            self._on_failure(error)
            return TrialScheduler.CONTINUE
        self._on_decision(decision)
        return TrialScheduler.CONTINUE if decision.goes_on else TrialScheduler.STOP

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        if FAILURE in result:
            self._withdraw(trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        if not trial.should_recover():  # else Tune begins it again, and it reports what it has
            self._withdraw(trial)

    def _withdraw(self, trial: Trial) -> None:
        try:
            self.rungs.withdraw(trial.config[NUMBER])
        except OSError as error:
            self._on_failure(error)
