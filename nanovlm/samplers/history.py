"""What a sampler is shown of the trials before: each kind of model learns from something else."""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

STORAGE_ERRORS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What a full disk or a database that is away for a while raises."""

_MOST_TRIALS = 250
_BEST_TRIALS = 50
_ENOUGH_VALUES = 10


class History:
    """Makes the list of trials that a sampler learns from."""

    def __init__(self, maximize: bool, pauses: bool = False) -> None:
        """
        Args:
            pauses: whether trials that have not ended may wait; their values count as if they had.
        """
        self._maximize = maximize
        self._pauses = pauses

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        raise NotImplementedError

    def _with_open(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials with those that have reported and not ended as if they were stopped."""
        if not self._pauses:
            return trials
        is_open = [t.state is TrialState.RUNNING and bool(t.intermediate_values) for t in trials]
        return [_stopped(t) if o else t for t, o in zip(trials, is_open, strict=True)]

    def _worst(self, values: list[float]) -> float:
        return min(values) if self._maximize else max(values)


class BestAndLatest(History):
    """For TPE: all running trials and, of very many finished ones, the best and the latest.

    TPE takes 25 trials at most for good ones, and of the others needs no more than where they lie;
    its time grows with their number. What is finished does not change, so each trial is ranked once
    however long the search is.
    """

    def __init__(self, maximize: bool, pauses: bool = False) -> None:
        super().__init__(maximize, pauses)
        self._num_seen = 0
        self._unfinished: list[int] = []  # numbers, ascending
        self._finished: list[int] = []  # numbers, ascending
        self._best: list[tuple[Any, int]] = []  # rank and number, the best first

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        self._take_in(trials)
        if len(self._finished) <= _MOST_TRIALS:
            return self._with_open(trials)
        shown = {number for _, number in self._best}
        shown |= {*self._finished[_BEST_TRIALS - _MOST_TRIALS :], *self._unfinished}
        return self._with_open([trials[number] for number in sorted(shown)])

    def _take_in(self, trials: list[FrozenTrial]) -> None:
        open_ = [*self._unfinished, *range(self._num_seen, len(trials))]
        self._num_seen = len(trials)
        self._unfinished = [number for number in open_ if not trials[number].state.is_finished()]
        for trial in _finished([trials[number] for number in open_]):
            bisect.insort(self._finished, trial.number)
            bisect.insort(self._best, (self._rank(trial), trial.number))
        del self._best[_BEST_TRIALS:]

    def _rank(self, trial: FrozenTrial) -> tuple[bool, bool, int, float]:
        """Order as TPE does: feasible, complete, then by how far it came, then by value."""
        is_pruned = trial.state is TrialState.PRUNED
        reached = -max(trial.intermediate_values, default=0) if is_pruned else 0
        value = float("inf") if trial.value is None else trial.value
        return is_infeasible(trial), is_pruned, reached, -value if self._maximize else value


class OneBudget(History):
    """For a Gaussian process: the trials with their values at one number of samples.

    It takes all values for measurements of one function, so they are those at the largest
    milestone that enough trials have reached, as in BOHB (Falkner et al. 2018, section 4.1).
    Infeasible trials have the worst of these values.
    """

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        trials = self._with_open(trials)
        finished = _finished(trials)
        judged = [t for t in finished if not is_infeasible(t) and t.value is not None]
        seen = self._at_one_budget(judged)
        if not seen:
            return _running(trials)
        worst = self._worst([value for _, value in seen])
        seen += [(trial, worst) for trial in finished if is_infeasible(trial)]
        return [*(_completed(trial, value) for trial, value in seen), *_running(trials)]

    def _at_one_budget(self, judged: list[FrozenTrial]) -> list[tuple[FrozenTrial, float]]:
        enough = min(_ENOUGH_VALUES, len(judged))
        complete = [t for t in judged if t.state is TrialState.COMPLETE]
        if complete and len(complete) >= enough:
            return [(trial, _value(trial)) for trial in complete]
        for step in sorted({s for t in judged for s in t.intermediate_values}, reverse=True):
            reached = [t for t in judged if step in t.intermediate_values]
            if len(reached) >= enough:
                return [(trial, trial.intermediate_values[step]) for trial in reached]
        return []


class WorstForInfeasible(History):
    """For CMA-ES, which knows no constraints: infeasible trials have the worst value so far."""

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        values = [t.value for t in trials if t.value is not None]
        if not values:
            return trials
        worst = self._worst(values)
        return [_completed(trial, worst) if is_infeasible(trial) else trial for trial in trials]


class StudyView(optuna.Study):
    """A study in which the sampler sees these trials and no others."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self._seen = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Any = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._seen if states is None or trial.state in states]


def is_infeasible(trial: FrozenTrial) -> bool:
    """Return whether the trial was told to break a constraint."""
    return any(value > 0 for value in trial.constraints.values())


def _finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def _running(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state is TrialState.RUNNING]


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, f"trial {trial.number} has no value"
    return trial.value


def _stopped(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial as one that ended at its last report."""
    last = max(trial.intermediate_values)
    return optuna.trial.create_trial(
        state=TrialState.PRUNED,
        value=trial.intermediate_values[last],
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
    )


def _completed(trial: FrozenTrial, value: float) -> FrozenTrial:
    """Return the trial as a full one with this value and without constraints."""
    attributes = trial.system_attrs.items()
    return FrozenTrial(
        number=trial.number,
        trial_id=trial._trial_id,
        state=TrialState.COMPLETE,
        value=value,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={},
        system_attrs={k: v for k, v in attributes if not k.startswith("constraints")},
        intermediate_values={},
    )


def looks_infeasible(
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    trials: Sequence[FrozenTrial],
) -> bool:
    """Return whether the finished trial that is nearest to `params` was infeasible.

    Distances are Euclidean, each parameter measured in its range and on its scale; two different
    choices without an order are as far apart as the ends of a range.
    """
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    known = [t for t in finished if params.keys() <= t.params.keys()]
    if not any(is_infeasible(trial) for trial in known):
        return False
    nearest = min(
        known,
        key=lambda trial: sum(
            _distance(distributions[key], value, trial.params[key]) ** 2
            for key, value in params.items()
        ),
    )
    return is_infeasible(nearest)


def _distance(distribution: BaseDistribution, one: Any, other: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(one != other)
    assert isinstance(distribution, FloatDistribution | IntDistribution), f"{distribution}"
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high, one, other = map(math.log, (low, high, one, other))
    return float(abs(one - other) / (high - low))
