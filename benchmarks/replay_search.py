"""Searchers and schedulers of Ray Tune as methods of a replay: this project's, and the stock ones.

Ray is left out: the searcher and the scheduler are called here as Tune calls them, in its order
(`TuneController._process_trial_result` and `stop_trial`).
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from benchmarks.replay_clock import Run
from benchmarks.replay_table import CurveTable
from nanovlm.distributed.session import StopSwitch
from nanovlm.distributed.trainable import IS_FINAL, SAMPLES_SEEN, VALUES
from nanovlm.results.read import RUNGS_FILE
from nanovlm.search.parameter import Parameter
from nanovlm.search.rungs import build_rungs
from nanovlm.search.scheduler import RungScheduler, plan_milestones
from nanovlm.search.searcher import build_searcher
from nanovlm.search.space import SearchSpace

_NO_CONTROLLER: Any = None  # the schedulers do not look at it


class TuneLoop:
    """Lets a searcher and a scheduler of Tune decide."""

    def __init__(
        self,
        table: CurveTable,
        searcher: Searcher,
        scheduler: TrialScheduler,
        milestones: tuple[int, ...],
        describe: Callable[[Run], dict[str, Any]],
    ) -> None:
        """
        Args:
            milestones: samples seen at which trials report before the end.
            describe: makes Tune's result of a trial's report.
        """
        self._table = table
        self._searcher = searcher
        self._scheduler = scheduler
        self._milestones = milestones
        self._describe = describe
        self._trials: dict[str, Any] = {}
        self._ids = (f"trial-{number:04d}" for number in itertools.count())

    def start(self) -> Run:
        trial_id = next(self._ids)
        config = self._searcher.suggest(trial_id)
        assert isinstance(config, dict), "these searchers always suggest something"
        trial = SimpleNamespace(trial_id=trial_id, config=config)
        self._trials[trial_id] = trial
        self._scheduler.on_trial_add(_NO_CONTROLLER, trial)  # type: ignore[arg-type]
        table = self._table
        row = table.nearest(config.get(VALUES, config))
        columns = [table.column(row, milestone) for milestone in self._milestones]
        return Run(trial_id, row, (*columns, table.last))

    def report(self, run: Run) -> bool:
        trial, result = self._trials[run.trial_id], self._describe(run)
        if not run.is_final:
            decision = self._scheduler.on_trial_result(_NO_CONTROLLER, trial, result)
            if decision == TrialScheduler.CONTINUE:
                self._searcher.on_trial_result(run.trial_id, result)
                return True
        self._scheduler.on_trial_complete(_NO_CONTROLLER, trial, result)
        self._searcher.on_trial_complete(run.trial_id, result)
        return False


def our_search(table: CurveTable, space: SearchSpace, concurrency: int, folder: Path) -> TuneLoop:
    """Return what `run_search.py` runs for a space.

    Args:
        folder: an empty one, for the study.
    """
    metric = space.objective.metric
    milestones = plan_milestones(space, table.budget)

    def describe(run: Run) -> dict[str, Any]:
        value, seen = run.value(table), run.samples(table)
        return {metric: value, SAMPLES_SEEN: seen, IS_FINAL: run.is_final}

    return TuneLoop(
        table,
        build_searcher(space, folder, concurrency, StopSwitch(), milestones),
        RungScheduler(build_rungs(space, milestones, folder / RUNGS_FILE), metric),
        milestones,
        describe,
    )


def stock_search(table: CurveTable, space: SearchSpace, seed: int) -> TuneLoop:
    """Return Ray Tune's own `OptunaSearch` and `ASHAScheduler`, as their documentation uses them.

    A report is made at the space's milestones. Time is `training_iteration`, which is 1 at the
    first milestone and grows by the reduction factor, so that both have the same rungs.
    """
    metric, mode = space.objective.metric, space.objective.mode
    searcher = OptunaSearch(metric=metric, mode=mode, seed=seed)
    searcher.set_search_properties(None, None, {p.key: _domain(p) for p in space.parameters})
    milestones = plan_milestones(space, table.budget)
    factor = space.scheduler.reduction_factor
    scheduler: TrialScheduler = FIFOScheduler()
    if milestones:
        scheduler = ASHAScheduler(
            metric=metric,
            mode=mode,
            max_t=factor ** len(milestones),
            grace_period=1,
            reduction_factor=factor,
        )

    def describe(run: Run) -> dict[str, Any]:
        iteration = factor ** (run.num_reports - 1)
        return {metric: run.value(table), "training_iteration": iteration}

    return TuneLoop(table, searcher, scheduler, milestones, describe)


def _domain(parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return tune.choice(list(parameter.values))
    domains = {
        "uniform": tune.uniform,
        "log_uniform": tune.loguniform,
        "int": tune.randint,
        "log_int": tune.lograndint,
    }
    low, high = parameter.values
    return domains[parameter.kind](low, high)  # type: ignore[arg-type]
