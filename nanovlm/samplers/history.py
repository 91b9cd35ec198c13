"""Which trials a sampler is shown, and with which values: each kind of model needs something else.

With several objectives a sampler that follows one value is shown a weighted one (`Scalarized`).
"""

import bisect
import copy
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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

from nanovlm.config.search_settings import Objective
from nanovlm.results.pareto import Box, Floats, least_extents, losses

STORAGE_ERRORS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What a full disk or a database that is away for a while raises."""

SOURCE, CURVE = "source", "curve"
"""Attributes of Optuna's trials that are of an earlier search of another length: its name, and the
values as pairs of how far the trial was trained there (1 in full) and what it reported."""

OTHERS = "others"
"""Attribute of Optuna's trials: by step, as text, the values of the objectives but the first."""

_MOST_TRIALS = 250
_BEST_TRIALS = 50
_ENOUGH_VALUES = 10

_SUM_SHARE = 0.05
"""Share of the weighted sum in the Chebyshev function: of two values that are equal where it counts
most, the one is better that is better elsewhere (Knowles' rho)."""

_FULL_LENGTH = -1
"""Stands for the last step of trials that ran in full, which depends on the batch size."""


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
        value = math.inf if trial.value is None else trial.value
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
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        seen = self._at_one_budget([t for t in finished if not is_infeasible(t)])
        if not seen:
            return running
        worst = self._worst([value for _, value in seen])
        seen += [(trial, worst) for trial in finished if is_infeasible(trial)]
        return [*(_completed(trial, value) for trial, value in seen), *running]

    def _at_one_budget(self, feasible: list[FrozenTrial]) -> list[tuple[FrozenTrial, float]]:
        known = [(trial, trial.value) for trial in feasible if trial.value is not None]
        enough = min(_ENOUGH_VALUES, len(known))
        complete = [(t, value) for t, value in known if t.state is TrialState.COMPLETE]
        if complete and len(complete) >= enough:
            return complete
        for step in sorted({s for t, _ in known for s in t.intermediate_values}, reverse=True):
            reached = [t for t, _ in known if step in t.intermediate_values]
            if len(reached) >= enough:
                return [(trial, trial.intermediate_values[step]) for trial in reached]
        return []


class WorstForInfeasible(History):
    """For CMA-ES, which knows no constraints: infeasible trials have the worst value of all."""

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        values = [t.value for t in trials if t.value is not None]
        if not values:
            return trials
        worst = self._worst(values)
        return [_completed(trial, worst) if is_infeasible(trial) else trial for trial in trials]


class Scalarized(History):
    """shows trials with one value instead of several, in the direction of the first.

    ParEGO (Knowles 2006, IEEE Transactions on Evolutionary Computation 10(1)): for each suggestion
    the objectives get new random weights, and the augmented Chebyshev function makes them one; over
    the trials of a search the weights cover the front. TPE could take several objectives as they
    are, but not a trial's values at milestones: Optuna keeps such values for one objective alone.
    """

    def __init__(self, objective: Objective, seed: int, shown: History | None) -> None:
        """
        Args:
            seed: of the weights.
            shown: what a sampler is shown of these trials; None shows all of them. It is asked
                once, since the values of trials that have ended are others each time.
        """
        super().__init__(maximize=objective.mode == "max")
        self._objective = objective
        self._shown = shown
        random = np.random.default_rng([seed, len(objective.all)])
        self._weights = random.dirichlet(np.ones(len(objective.all)))

    def __call__(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        values = self._values(trials)
        scalarized = [_with_values(t, values.get(index, {})) for index, t in enumerate(trials)]
        return scalarized if self._shown is None else self._shown(scalarized)

    def _values(self, trials: Sequence[FrozenTrial]) -> dict[int, dict[Hashable, float]]:
        """Return the value of each trial at each step, by its index."""
        levels: dict[Hashable, list[tuple[int, Hashable, Sequence[float]]]] = {}
        for index, trial in enumerate(trials):
            for step, level, row in self._reports(trial):
                levels.setdefault(level, []).append((index, step, row))
        found: dict[int, dict[Hashable, float]] = {}
        for reports in levels.values():
            values = self._scalarize(losses(self._objective, [row for *_, row in reports]))
            for (index, step, _), value in zip(reports, values, strict=True):
                found.setdefault(index, {})[step] = -value if self._maximize else value
        return found

    def _reports(self, trial: FrozenTrial) -> Iterator[tuple[Hashable, Hashable, Sequence[float]]]:
        """Yield step, level and values of what a trial has reported. An earlier search of another
        length has levels of its own."""
        others, source = trial.user_attrs.get(OTHERS, {}), trial.user_attrs.get(SOURCE)
        last = max(trial.intermediate_values, default=None)
        for step, value in trial.intermediate_values.items():
            is_full = trial.state is TrialState.COMPLETE and step == last
            if str(step) in others:
                level = _FULL_LENGTH if is_full else step
                yield step, (source, level), (value, *others[str(step)])
        for share, *values in trial.user_attrs.get(CURVE, ()):
            yield (CURVE, share), (source, CURVE, share), values

    def _scalarize(self, rows: Floats) -> list[float]:
        """Return one loss for each row, 0 for what would be best in all objectives.

        Each milestone has its own box, so that the weights cover the front there."""
        weighted = Box.around(rows, least_extents(self._objective)).scaled(rows) * self._weights
        found: list[float] = (weighted.max(axis=1) + _SUM_SHARE * weighted.sum(axis=1)).tolist()
        return found


def is_infeasible(trial: FrozenTrial) -> bool:
    """Return whether the trial breaks a constraint."""
    return any(value > 0 for value in trial.constraints.values())


def looks_infeasible(
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    trials: Sequence[FrozenTrial],
) -> bool:
    """Return whether the finished trial that is nearest to `params` was infeasible.

    Distances are Euclidean, each parameter measured in its range and on its scale; two different
    choices without an order are as far apart as the ends of a range.
    """
    known = [t for t in _finished(trials) if params.keys() <= t.params.keys()]
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


def _finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


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
    shown = copy.copy(trial)
    shown.state, shown.value = TrialState.COMPLETE, value
    shown.user_attrs, shown.intermediate_values = {}, {}
    shown.system_attrs = {k: v for k, v in attributes if not k.startswith("constraints")}
    return shown


def _with_values(trial: FrozenTrial, values: dict[Hashable, float]) -> FrozenTrial:
    """Return the trial with these values by step and none else."""
    shown = copy.copy(trial)
    steps = {step: value for step, value in values.items() if isinstance(step, int)}
    shown.intermediate_values = steps
    if trial.values is not None:
        shown.value = steps[max(steps)] if steps else None
    if CURVE in trial.user_attrs:
        curve = [(share, values[CURVE, share]) for share, *_ in trial.user_attrs[CURVE]]
        shown.user_attrs = {**trial.user_attrs, CURVE: curve}
    return shown
