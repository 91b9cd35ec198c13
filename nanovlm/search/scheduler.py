"""When a trial is stopped early: at milestones counted in samples seen, by the rungs' rules.

The milestones are counted back from the full budget of a trial, so that the last comparison
before the end always has the same distance to it: with `rungs: 4, reduction_factor: 3` trials are
compared at 1/27, 1/9 and 1/3 of the budget, and the end is the fourth rung.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from nanovlm.distributed.trainable import (
    FAILURE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    UNFINISHED,
)
from nanovlm.errors import UserError
from nanovlm.results.read import RUNGS_FILE
from nanovlm.search.rungs import Rungs, Verdict, build_rungs
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


OnVerdict = Callable[[Verdict], None]


def build_scheduler(
    space: SearchSpace,
    milestones: tuple[int, ...],
    folder: Path | None = None,
    on_verdict: OnVerdict = lambda *_: None,
) -> "Scheduler":
    """Return Tune's scheduler for these milestones.

    Args:
        folder: the results folder that keeps what is decided; None keeps it in memory.
        on_verdict: told of each verdict when it is safe in the folder.
    """
    if not milestones:
        return FIFOScheduler()
    rungs = build_rungs(space, milestones, folder and folder / RUNGS_FILE)
    return RungScheduler(rungs, space.objective.metric, on_verdict)


class RungScheduler(FIFOScheduler):
    """Lets the rungs decide: `asha`, `hyperband` and `pasha`.

    Tune's own classes lose their rungs when a search goes on after an interruption, keep the values
    of trials that failed later, and draw brackets that differ from run to run.
    """

    def __init__(self, rungs: Rungs, metric: str, on_verdict: OnVerdict) -> None:
        super().__init__()
        self.rungs = rungs
        self._objective = metric
        self._on_verdict = on_verdict

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        if FAILURE in result or UNFINISHED in result or result.get(IS_FINAL):
            return TrialScheduler.CONTINUE
        verdict = self.rungs.judge(
            trial.config[NUMBER], result[SAMPLES_SEEN], result[self._objective]
        )
        self._on_verdict(verdict)
        return TrialScheduler.CONTINUE if verdict.goes_on else TrialScheduler.STOP

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        if FAILURE in result:
            self.rungs.withdraw(trial.config[NUMBER])

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        if not trial.should_recover():  # else Tune begins it again, and it reports what it has
            self.rungs.withdraw(trial.config[NUMBER])


Scheduler = RungScheduler | FIFOScheduler
