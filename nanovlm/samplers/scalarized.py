"""How samplers that follow one value learn of several objectives: a new weighting for each trial.

ParEGO (Knowles 2006, IEEE Transactions on Evolutionary Computation 10(1)): for each suggestion the
objectives are weighed anew, at random, and made one by the augmented Chebyshev function; over the
trials of a search the weights cover the front. What is not worth its cost in one weighting may be
in the next. TPE could take several objectives as they are, but not a trial's values at milestones:
Optuna keeps such values for one objective alone.
"""

import copy
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from nanovlm.config.search_settings import Objective
from nanovlm.results.pareto import Box, Floats, least_extents, losses
from nanovlm.samplers.history import History
from nanovlm.samplers.milestone_sampler import CURVE, SOURCE

OTHERS = "others"
"""Attribute of Optuna's trials: by step, as text, the values of the objectives but the first."""

_SUM_SHARE = 0.05
"""Of the weighted sum in the function: of two values that are equal where it counts most, the one
is better that is so elsewhere (Knowles' rho)."""

_FULL_LENGTH = -1
"""Stands for the last step of trials that ran in full, which depends on the batch size."""

_Place = tuple[int, Hashable]
"""Place of a trial, and step, or length in the curve of an earlier search of another length."""


class Scalarized(History):
    """Shows trials with one value in place of several, in the direction of the first."""

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
        scalarized = [_with_values(t, values.get(place, {})) for place, t in enumerate(trials)]
        return scalarized if self._shown is None else self._shown(scalarized)

    def _values(self, trials: Sequence[FrozenTrial]) -> dict[int, dict[Hashable, float]]:
        """Return the value of each trial at each step, by its place."""
        levels: dict[Hashable, list[tuple[_Place, Sequence[float]]]] = {}
        for place, trial in enumerate(trials):
            for step, level, row in self._reports(trial):
                levels.setdefault(level, []).append(((place, step), row))
        found: dict[int, dict[Hashable, float]] = {}
        for reports in levels.values():
            values = self._scalarize(losses(self._objective, [row for _, row in reports]))
            for ((place, step), _), value in zip(reports, values, strict=True):
                found.setdefault(place, {})[step] = -value if self._maximize else value
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
