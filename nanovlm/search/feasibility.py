"""Where trials fail by their own values, told from the trials before: the nearest one says."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from nanovlm.search.history import is_infeasible


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
