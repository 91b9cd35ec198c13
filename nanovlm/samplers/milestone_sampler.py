"""A sampler that learns from trials wherever they are: waiting, stopped, under way or complete.

A Gaussian process over configurations and milestones says what each configuration would come to,
and the next trial is where the expected improvement is largest, at the last milestone that enough
trials have reached. What runs without a report counts as if it had the mean that is expected of it,
so trials that start together do not try the same.

Each earlier search of another length has a process of its own. What that one expects of a full
training enters here with a weight, which is learnt.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import erfcx, log_ndtr
from scipy.stats import qmc
from threadpoolctl import threadpool_limits

from nanovlm.results.statistics import rank_correlation
from nanovlm.samplers.gaussian_process import GaussianProcess, UnitCube, choose_longest
from nanovlm.samplers.history import CURVE, SOURCE, is_infeasible
from nanovlm.samplers.optuna_compat import set_system_attr

Floats = NDArray[np.float64]

RANDOM_TRIALS = 4
"""Before the process is asked, the default configuration among them."""

_LEAST_REPORTS = 3
"""The process is not asked before so many trials have reported."""

_MOST_REPORTS = 400
"""That the process learns from: its time grows with the third power of them."""

_MOST_EARLIER_REPORTS = 200
"""Of earlier searches together."""

_ENOUGH_VALUES = 6
"""A milestone that so many trials have reached is what the improvement is expected at."""

CORRELATIONS = "warm_start_correlations"
"""Attribute that a new trial gets in Optuna: by earlier search, the rank correlation of what that
one expected with what the trials here came to."""

_SPREAD_WEIGHT = 4
"""As so many reports counts the spread of earlier searches for that of this one."""

_WORST_SPREADS = 5.0
"""Values below the best by more than so many times what the median is are taken for that: how bad
a failure is says nothing of where the best ones are."""

_NUM_DRAWS = 1024
_NUM_LEADERS, _NUM_NEAR = 6, 60
"""Draws near the best configurations."""
_NUM_CLIMBERS, _NUM_STEPS, _NUM_TRIES = 10, 6, 12
"""The best draws climb: so many steps, each the best of so many tries."""


@dataclass(frozen=True)
class _Reports:
    """What trials have reported, and where others are under way."""

    coordinates: Floats
    """float[n, keys]"""
    lengths: Floats
    """float[n], logarithm of how far each was trained to the base of the reduction factor; 0 in
    full, -1 at the last milestone."""
    values: Floats
    """float[n]; more is better."""
    pending: Floats
    """float[m, keys], of trials without a report."""
    infeasible: NDArray[np.bool_]
    """bool[n], reports that stand for trials which failed by their own values."""

    @property
    def tell_apart(self) -> bool:
        """Whether there are different values."""
        return len(np.unique(self.values)) > 1

    def level_and_spread(self, others: Sequence["_Reports"] = ()) -> tuple[float, float]:
        """Return mean and standard deviation of the values; few values say little of their spread,
        so that of others counts too."""
        if not others:
            return float(self.values.mean()), float(self.values.std())
        num = len(self.values)
        level, variance = (self.values.mean(), self.values.var()) if num else (0.0, 0.0)
        usual = np.mean([each.values.var() for each in others])
        weights = (num, _SPREAD_WEIGHT)
        return float(level), math.sqrt(np.average((variance, usual), weights=weights))


@dataclass(frozen=True)
class _Past:
    """An earlier search of another length."""

    reports: _Reports
    process: GaussianProcess
    level: float
    """What the process expects of full trainings on average."""

    def expect(self, points: Floats) -> Floats:
        """Return what is expected of full trainings at float[n, features], less the level."""
        return self.process.predict(points, 0.0)[0] - self.level


class MilestoneSampler(BaseSampler):
    """Gives the values of the next trial; for spaces in which all keys are active."""

    def __init__(
        self,
        seed: int,
        *,
        maximize: bool,
        milestones: Sequence[int],
        reduction_factor: int,
        independent: BaseSampler,
    ) -> None:
        """
        Args:
            milestones: samples seen at which trials report before the end, ascending.
            independent: draws while there is nothing to learn from.
        """
        self._random = np.random.default_rng(seed)
        self._seed = seed
        self._sign = 1.0 if maximize else -1.0
        self._milestones = tuple(milestones)
        self._factor = reduction_factor
        self._independent = independent

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = [t for t in study.get_trials(deepcopy=False) if search_space.keys() <= {*t.params}]
        num_reported = sum(bool(t.intermediate_values) or is_infeasible(t) for t in trials)
        if not search_space or len(trials) < RANDOM_TRIALS or num_reported < _LEAST_REPORTS:
            return {}
        cube = UnitCube(search_space)
        by_source: dict[str, list[FrozenTrial]] = {}
        for each in trials:
            by_source.setdefault(each.user_attrs.get(SOURCE, ""), []).append(each)
        reports = self._reports(cube, by_source.pop("", []), _MOST_REPORTS)
        most = _MOST_EARLIER_REPORTS // max(1, len(by_source))
        earlier = {name: self._reports(cube, those, most) for name, those in by_source.items()}
        earlier = {name: those for name, those in earlier.items() if those.tell_apart}
        if not (reports.tell_apart or earlier):
            return {}
        with threadpool_limits(1):  # others would take time from the workers
            past = {name: self._past(cube, those) for name, those in earlier.items()}
            self._note_correlations(study, trial, cube, reports, past)
            return cube.decode(self._best_point(cube, reports, tuple(past.values())))

    # ------------------------------------------------------------------ what is known

    def _reports(self, cube: UnitCube, trials: Sequence[FrozenTrial], most: int) -> _Reports:
        rows = [(trial, *row) for trial in trials for row in self._rows(trial)]
        kept = choose_longest(np.array([row[1] for row in rows]), most, self._seed)
        rows = [rows[index] for index in kept]
        pending = [
            cube.encode(trial.params)
            for trial in trials
            if trial.state is TrialState.RUNNING and not trial.intermediate_values
        ]
        lengths = np.array([length for _, length, _, _ in rows])
        return _Reports(
            np.array([cube.encode(row[0].params) for row in rows]).reshape(-1, cube.num_keys),
            lengths,
            _without_outliers(np.array([value for _, _, value, _ in rows]), lengths),
            np.array(pending).reshape(-1, cube.num_keys),
            np.array([is_infeasible for *_, is_infeasible in rows], bool),
        )

    def _rows(self, trial: FrozenTrial) -> Iterator[tuple[float, float, bool]]:
        """Yield length, value and whether it is infeasible of what a trial says."""
        if is_infeasible(trial):
            yield float(-len(self._milestones)), -math.inf, True
        elif SOURCE in trial.user_attrs:
            for share, value in trial.user_attrs[CURVE]:
                yield min(0.0, math.log(share, self._factor)), self._sign * value, False
        elif trial.intermediate_values:
            for step, value in trial.intermediate_values.items():
                yield self._length(trial, step), self._sign * value, False
        elif trial.state is TrialState.COMPLETE and trial.value is not None:
            yield 0.0, self._sign * trial.value, False

    def _length(self, trial: FrozenTrial, step: int) -> float:
        """Return how far a trial was trained at a step, on the scale of `_Reports.lengths`."""
        if trial.state is TrialState.COMPLETE and step == max(trial.intermediate_values):
            return 0.0
        if step in self._milestones:
            return float(self._milestones.index(step) - len(self._milestones))
        if not self._milestones:
            return -1.0
        full = self._milestones[-1] * self._factor
        return min(0.0, math.log(step / full, self._factor))

    def _process(
        self, cube: UnitCube, reports: _Reports, past: Sequence[_Past] = ()
    ) -> GaussianProcess:
        level, spread = reports.level_and_spread([each.reports for each in past])
        scales = [np.log(each.process.scales) for each in past]
        return GaussianProcess(
            cube.features(reports.coordinates),
            reports.lengths,
            (reports.values - level) / spread,
            cube.groups,
            self._seed,
            [each.expect for each in past],
            np.exp(np.mean(scales, axis=0)) if scales else None,
        )

    def _shortest(self, reports: _Reports) -> float:
        """Return how far the shortest training has come, or the first one will."""
        lengths = reports.lengths
        return float(lengths.min()) if len(lengths) else float(-len(self._milestones))

    def _decided_length(self, reports: _Reports) -> float:
        """Return the last milestone that enough trials have reached, else the shortest one."""
        levels, counts = np.unique(reports.lengths, return_counts=True)
        enough = levels[counts >= _ENOUGH_VALUES]
        return float(enough.max()) if len(enough) else self._shortest(reports)

    # ------------------------------------------------------------------ earlier searches

    def _past(self, cube: UnitCube, reports: _Reports) -> _Past:
        process = self._process(cube, reports)
        expected, _ = process.predict(cube.features(reports.coordinates), 0.0)
        return _Past(reports, process, float(expected.mean()))

    def _note_correlations(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        cube: UnitCube,
        reports: _Reports,
        past: Mapping[str, _Past],
    ) -> None:
        """Note how well the earlier searches foresaw what trials came to, once there are enough."""
        here = (reports.lengths == self._decided_length(reports)) & ~reports.infeasible
        values, points = reports.values[here], cube.features(reports.coordinates[here])
        if past and len(values) >= _ENOUGH_VALUES:
            found = {
                name: rank_correlation(each.expect(points).tolist(), values.tolist())
                for name, each in past.items()
            }
            set_system_attr(study, trial, CORRELATIONS, found)

    # ------------------------------------------------------------------ what is next

    def _best_point(self, cube: UnitCube, reports: _Reports, past: Sequence[_Past] = ()) -> Floats:
        """Return the coordinates with the largest expected improvement, float[keys]."""
        features = cube.features(reports.coordinates)
        process = self._process(cube, reports, past)
        length = self._decided_length(reports)
        process.believe(cube.features(reports.pending), self._shortest(reports))
        tried = np.vstack([reports.coordinates, reports.pending])
        known = np.vstack([tried, *(each.reports.coordinates for each in past)])
        expected, _ = process.predict(cube.features(known), length)
        leaders = known[np.argsort(-expected, kind="stable")[:_NUM_LEADERS]]
        best = float(expected[: len(tried) or None].max())

        def improvement(coordinates: Floats) -> Floats:
            points = cube.features(coordinates)
            found = log_expected_improvement(*process.predict(points, length), best)
            if reports.infeasible.any():
                found[_nearest_is(reports.infeasible, features, points)] -= 1e3
            return found

        return self._climb(improvement, cube.num_keys, leaders)

    def _climb(self, improvement: Any, num_keys: int, leaders: Floats) -> Floats:
        """Return the best of points drawn in the whole cube and near the leaders, after a climb."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # more keys than Sobol's sequence is for
            even = qmc.Sobol(num_keys, rng=self._random).random(_NUM_DRAWS)
        near = [self._near(np.repeat(p[None], _NUM_NEAR, 0), 0.1) for p in leaders]
        points = np.vstack([even, *near])
        values = improvement(points)
        best = np.argsort(-values, kind="stable")[:_NUM_CLIMBERS]
        points, values = points[best], values[best]
        climbers = np.arange(len(points))
        for size in np.geomspace(0.2, 0.01, _NUM_STEPS):
            tries = self._near(np.repeat(points, _NUM_TRIES, axis=0), size)
            found = improvement(tries).reshape(len(points), _NUM_TRIES)
            chosen = found.argmax(axis=1)
            is_better = found[climbers, chosen] > values
            moved = tries.reshape(len(points), _NUM_TRIES, num_keys)[climbers, chosen]
            points = np.where(is_better[:, None], moved, points)
            values = np.where(is_better, found[climbers, chosen], values)
        return points[values.argmax()]

    def _near(self, points: Floats, size: float) -> Floats:
        """Return points moved by so much in half of their coordinates."""
        moves = self._random.normal(size=points.shape) * size
        return np.clip(points + moves * (self._random.random(points.shape) < 0.5), 0, 1)


def log_expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Return the logarithm of how much more than `best` is expected of normal variables.

    Exact far below the best too, where the improvement itself is 0 in floating point
    (Ament et al. 2023, arXiv 2310.20708, section 4.1).
    """
    z = (mean - best) / deviation
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    with np.errstate(all="ignore"):  # of the branch that is not taken
        near = np.log(np.exp(log_density) + z * np.exp(log_ndtr(z)))
        tail = np.log1p(math.sqrt(math.pi / 2) * z * erfcx(-z / math.sqrt(2)))
        far = log_density + np.where(z < -1e4, -2 * np.log(-z), tail)
    return np.where(z > -1, near, far) + np.log(deviation)


def _without_outliers(values: Floats, lengths: Floats) -> Floats:
    """Return the values of each length with those far below the best raised."""
    raised = values.copy()
    for length in np.unique(lengths):
        here = lengths == length
        finite = values[here & np.isfinite(values)]
        if len(finite):
            best, median = finite.max(), np.median(finite)
            raised[here] = np.maximum(values[here], best - _WORST_SPREADS * (best - median))
    # Infeasible ones are worse than all that has reported.
    lowest = raised[np.isfinite(raised)].min() if np.isfinite(raised).any() else 0.0
    return np.maximum(raised, lowest)


def _nearest_is(marked: NDArray[np.bool_], features: Floats, points: Floats) -> NDArray[np.bool_]:
    """Return whether the report nearest to each point is marked, bool[n]."""
    squared = ((points[:, None] - features[None]) ** 2).sum(axis=2)
    return marked[squared.argmin(axis=1)]
