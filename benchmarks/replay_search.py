"""Searchers and schedulers of Ray Tune as methods of a replay: this project's, and the stock ones.

Ray is left out: the searcher and the scheduler are called here as Tune calls them, in its order
(`TuneController._process_trial_result` and `stop_trial`).
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from benchmarks.replay_clock import Run
from benchmarks.replay_table import Curves, TradeoffCurves
from nanovlm.cluster.relay import IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.parameter import Parameter
from nanovlm.config.space import SearchSpace
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.results.read import RUNGS_FILE
from nanovlm.search.plan import plan_milestones
from nanovlm.search.searcher import Pauses, RungScheduler, StudySearch

_NO_CONTROLLER: Any = None  # the schedulers do not look at it


class TuneLoop:
    """Lets a searcher and a scheduler of Tune decide.

    A trial that pauses and is promoted is another trial for Tune each time (a leg), under the same
    number.
    """

    def __init__(
        self,
        curves: Curves,
        searcher: Searcher,
        scheduler: TrialScheduler,
        milestones: tuple[int, ...],
        describe: Callable[[Run], dict[str, Any]],
        *,
        pauses: bool = False,
        prepares: bool = False,
    ) -> None:
        """
        Args:
            milestones: samples seen at which trials report before the end.
            describe: makes Tune's result of a trial's report.
            pauses: whether the searcher may suggest the number of a trial that was stopped.
            prepares: whether a suggestion is made while the slots train.
        """
        self._curves = curves
        self._searcher = searcher
        self._scheduler = scheduler
        self._milestones = milestones
        self._describe = describe
        self.pauses, self.prepares = pauses, prepares
        self._ids = (f"trial-{number:04d}" for number in itertools.count())
        self._legs: dict[Run, Any] = {}  # Tune's trial of each run that is under way
        self._paused: dict[int | None, Run] = {}  # by number

    @property
    def searcher(self) -> StudySearch:
        """The searcher, if it is this project's."""
        assert isinstance(self._searcher, StudySearch), f"{self._searcher} is Ray's"
        return self._searcher

    def start(self) -> Run | None:
        trial_id = next(self._ids)
        config = self._searcher.suggest(trial_id)
        if not isinstance(config, dict):
            return None  # nothing to run now, or ever
        leg = SimpleNamespace(trial_id=trial_id, config=config)
        self._scheduler.on_trial_add(_NO_CONTROLLER, leg)  # type: ignore[arg-type]
        run = self._take_up(config.get(NUMBER)) or self._begin(trial_id, config)
        self._legs[run] = leg
        return run

    def _take_up(self, number: int | None) -> Run | None:
        """Return the run of a trial that has paused, None of a new one."""
        if not self.pauses:
            return None
        under_way = {leg.config[NUMBER] for leg in self._legs.values()}
        assert number not in under_way, f"trial {number} was suggested while it trains"
        return self._paused.pop(number, None)

    def _begin(self, trial_id: str, config: Mapping[str, Any]) -> Run:
        row = self._curves.row_of(config.get(VALUES, config))
        columns = [self._curves.column(row, milestone) for milestone in self._milestones]
        return Run(trial_id, row, (*columns, self._curves.last))

    def report(self, run: Run) -> bool:
        leg, result = self._legs[run], self._describe(run)
        if not run.is_final:
            decision = self._scheduler.on_trial_result(_NO_CONTROLLER, leg, result)
            if decision == TrialScheduler.CONTINUE:
                self._searcher.on_trial_result(leg.trial_id, result)
                return True
            if self.pauses:
                self._paused[leg.config[NUMBER]] = run
        del self._legs[run]
        self._scheduler.on_trial_complete(_NO_CONTROLLER, leg, result)
        self._searcher.on_trial_complete(leg.trial_id, result)
        return False

    def seconds(self) -> float:
        return time.process_time()


def our_search(
    curves: Curves, space: SearchSpace, concurrency: int, folder: Path, prepares: bool = False
) -> TuneLoop:
    """Return what `run_search.py` runs for a space.

    Args:
        folder: an empty one, for the study.
        prepares: whether a suggestion is made while the slots train.
    """
    metrics = [objective.metric for objective in space.objective.all]
    milestones = plan_milestones(space, curves.budget)

    def describe(run: Run) -> dict[str, Any]:
        values = [run.value(curves)]
        if len(metrics) > 1:
            assert isinstance(curves, TradeoffCurves), "there are several objectives"
            values += curves.others(run.row, run.columns[run.num_reports - 1])
        measured = dict(zip(metrics, values, strict=True))
        return {**measured, SAMPLES_SEEN: run.samples(curves), IS_FINAL: run.is_final}

    rungs = build_rungs(space, milestones, folder / RUNGS_FILE)
    pauses = Pauses(rungs) if isinstance(rungs, PausingHalving) else None
    return TuneLoop(
        curves,
        StudySearch(space, folder, concurrency, StopSwitch(), milestones, pauses=pauses),
        RungScheduler(rungs),
        milestones,
        describe,
        pauses=pauses is not None,
        prepares=prepares,
    )


@dataclass(frozen=True)
class StockRungs:
    """When trials of Ray Tune's own scheduler are compared."""

    milestones: tuple[int, ...]
    """Samples seen, before the end."""
    iterations: tuple[int, ...]
    """What Ray calls `training_iteration`, at each milestone and at the end."""
    reduction_factor: int


def stock_search(
    curves: Curves, space: SearchSpace, seed: int, rungs: StockRungs | None = None
) -> TuneLoop:
    """Return Ray Tune's own `OptunaSearch` and `ASHAScheduler`, as their documentation uses them.

    Args:
        rungs: None takes the space's: `training_iteration` is 1 at the first milestone and grows
            by the reduction factor.
    """
    metric, mode = space.objective.metric, space.objective.mode
    searcher = OptunaSearch(metric=metric, mode=mode, seed=seed)
    searcher.set_search_properties(None, None, {p.key: _domain(p) for p in space.parameters})
    if rungs is None:
        milestones = plan_milestones(space, curves.budget)
        factor = space.scheduler.reduction_factor
        powers = tuple(factor**rung for rung in range(len(milestones) + 1))
        rungs = StockRungs(milestones, powers, factor)
    scheduler: TrialScheduler = FIFOScheduler()
    if rungs.milestones:
        scheduler = ASHAScheduler(
            metric=metric,
            mode=mode,
            max_t=rungs.iterations[-1],
            grace_period=rungs.iterations[0],
            reduction_factor=rungs.reduction_factor,
        )

    def describe(run: Run) -> dict[str, Any]:
        iteration = rungs.iterations[run.num_reports - 1]
        return {metric: run.value(curves), "training_iteration": iteration}

    return TuneLoop(curves, searcher, scheduler, rungs.milestones, describe)


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
    if parameter.kind.endswith("int"):
        high += 1  # type: ignore[operator] # which Tune leaves out
    return domains[parameter.kind](low, high)  # type: ignore[arg-type]
