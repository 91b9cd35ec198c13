"""A Gaussian process over configurations and how far they were trained.

    process = GaussianProcess(points, lengths, values, groups)
    mean, deviation = process.predict(others, 0.0)

The covariance of two reports is that of their configurations (Matern 5/2 with a length scale for
each key) times that of how far they were trained (exponential in the logarithm of the samples), so
what is learnt early counts later as far as the data say so. Reports of one length share an offset:
a training's level grows on its way. Rasmussen and Williams 2006, chapters 2, 4 and 5; a kernel of
such a product for unfinished trainings is that of Klein et al. 2017 (arXiv 1605.07079).

What others expect of a configuration, such as processes of earlier searches, may enter with weights
of their own. They are unknown too (Rasmussen and Williams, section 2.7): normal around what an
expectation as good as the truth has, and as small as the values say. So one that tells nothing is
soon let be, and the scales are those of this search alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

Floats = NDArray[np.float64]
Expectation = Callable[[Floats], Floats]
"""Returns float[n] of float[n, features]."""

_SQRT5 = math.sqrt(5)
_LEAST_NOISE = 1e-4
"""Variance of a report, in units of the variance of all values."""
_JITTER = 1e-8
_OFFSET_VARIANCE = 1.0
_WEIGHT, _WEIGHT_DEVIATION = 0.7, 0.5
"""Of an expectation, before there are values."""
_MOST_FITTED = 150
"""Reports that the scales are fitted to: time grows with the third power."""
_MOST_STEPS = 60

# Logarithms of: the scale of each key, variance, noise, scale of the length. Priors are normal.
_START = {"scale": math.log(0.7), "variance": 0.0, "noise": math.log(1e-2), "length": math.log(2)}
_SPREAD = {"scale": 1.0, "variance": 1.0, "noise": 1.5, "length": 1.0}
_BOUNDS = {"scale": (-3.5, 3.5), "variance": (-4, 4), "noise": (-11.5, 0), "length": (-2.3, 4)}


class GaussianProcess:
    """The posterior given all reports, with the scales that are most probable given some."""

    def __init__(
        self,
        points: Floats,
        lengths: Floats,
        values: Floats,
        groups: NDArray[np.int64],
        seed: int = 0,
        expectations: Sequence[Expectation] = (),
        usual_scales: Floats | None = None,
    ) -> None:
        """
        Args:
            points: float[n, features] of the configurations.
            lengths: float[n], logarithm of how far each was trained, 0 in full.
            values: float[n], with mean 0 and variance 1 or so.
            groups: int[features], the key that a feature is of; it has one scale.
            seed: chooses to which reports the scales are fitted, if there are many.
            expectations: what others expect of the full training, on the scale of the values.
            usual_scales: float[keys], where the prior of their logarithms has its middle; None: all
                keys count alike before there are values.
        """
        self._groups, self._usual_scales = groups, usual_scales
        self._expectations = expectations
        self._points, self._lengths, self._values = points, lengths, values
        self._expected = self._expect(points)
        some = choose_longest(lengths, _MOST_FITTED, seed)
        self._fit(points[some], lengths[some], values[some], self._expected[some])
        self._condition()

    def predict(self, points: Floats, length: float) -> tuple[Floats, Floats]:
        """Return mean and standard deviation, float[n] each, of values at a length."""
        lengths = np.full(len(points), length)
        expected = self._expect(points)
        covariance = self._covariance(self._points, self._lengths, points, lengths)
        covariance += _common(self._expected, expected)
        reduced = solve_triangular(self._factor, covariance, lower=True)
        weighed = _WEIGHT_DEVIATION**2 * (expected**2).sum(axis=1)
        before = self._variance + _OFFSET_VARIANCE + weighed
        variance = before - (reduced**2).sum(axis=0)
        mean = covariance.T @ self._weights + _WEIGHT * expected.sum(axis=1)
        return mean, np.sqrt(np.maximum(variance, 1e-9))

    def believe(self, points: Floats, length: float) -> None:
        """Take the mean for what will be reported at points whose trials are under way."""
        if len(points) == 0:
            return
        means, _ = self.predict(points, length)
        self._points = np.vstack([self._points, points])
        self._lengths = np.append(self._lengths, np.full(len(points), length))
        self._values = np.append(self._values, means)
        self._expected = np.vstack([self._expected, self._expect(points)])
        self._condition()

    # ------------------------------------------------------------------ inside

    def _expect(self, points: Floats) -> Floats:
        """Return what each of the others expects, float[n, others]."""
        columns = [expect(points) for expect in self._expectations]
        return np.column_stack(columns) if columns else np.zeros((len(points), 0))

    def _condition(self) -> None:
        covariance = self._covariance(self._points, self._lengths, self._points, self._lengths)
        covariance += _common(self._expected, self._expected)
        covariance[np.diag_indices_from(covariance)] += self._noise + _JITTER
        self._factor = cholesky(covariance, lower=True)
        rest = self._values - _WEIGHT * self._expected.sum(axis=1)
        self._weights = cho_solve((self._factor, True), rest)

    def _covariance(
        self, points: Floats, lengths: Floats, others: Floats, other_lengths: Floats
    ) -> Floats:
        ours, theirs = (each / self.scales[self._groups] for each in (points, others))
        squared = (ours**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2 * ours @ theirs.T
        apart = np.abs(lengths[:, None] - other_lengths)
        kernel, _ = _matern(np.maximum(squared, 0))
        return self._variance * kernel * np.exp(-apart / self._length_scale) + _offsets(apart)

    def _fit(self, points: Floats, lengths: Floats, values: Floats, expected: Floats) -> None:
        """Find the most probable scales (MAP) by their gradient."""
        num_keys = int(self._groups.max()) + 1
        names = ["scale"] * num_keys + ["variance", "noise", "length"]
        start = np.array([_START[name] for name in names])
        if self._usual_scales is not None:
            start[:num_keys] = np.log(self._usual_scales)
        rest = values - _WEIGHT * expected.sum(axis=1)
        objective = _NegativeLogPosterior(points, lengths, rest, self._groups, num_keys, expected)
        found = minimize(
            lambda at: objective(at, start, np.array([_SPREAD[name] for name in names])),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[_BOUNDS[name] for name in names],
            options={"maxiter": _MOST_STEPS},
        )
        self.scales: Floats = np.exp(found.x[:num_keys])
        """float[keys], how far a key's values are alike."""
        self._variance, noise, self._length_scale = np.exp(found.x[num_keys:])
        self._noise = noise + _LEAST_NOISE


class _NegativeLogPosterior:
    """Of the logarithms of the scales, with its gradient."""

    def __init__(
        self,
        points: Floats,
        lengths: Floats,
        values: Floats,
        groups: NDArray[np.int64],
        num_keys: int,
        expected: Floats,
    ) -> None:
        features = (points[:, None] - points[None]) ** 2
        self._squared = np.zeros((num_keys, len(points), len(points)))
        for feature, key in enumerate(groups):
            self._squared[key] += features[..., feature]
        self._apart = np.abs(lengths[:, None] - lengths)
        self._offsets = _offsets(self._apart) + _common(expected, expected)
        self._values = values

    def __call__(self, at: Floats, center: Floats, spread: Floats) -> tuple[float, Floats]:
        num_keys = len(self._squared)
        scales = np.exp(at[:num_keys])
        variance, noise, length_scale = np.exp(at[num_keys:])
        kernel, slope = _matern(np.tensordot(1 / scales**2, self._squared, axes=1))
        shared = variance * np.exp(-self._apart / length_scale)
        signal = shared * kernel
        covariance = signal + self._offsets
        covariance[np.diag_indices_from(covariance)] += noise + _LEAST_NOISE + _JITTER
        factor = cholesky(covariance, lower=True)
        weights = cho_solve((factor, True), self._values)
        # The gradient is half the trace of this times the derivative of the covariance.
        outer = cho_solve((factor, True), np.eye(len(weights))) - np.outer(weights, weights)
        by_scale = np.tensordot(self._squared, outer * shared * slope, axes=2) / scales**2
        gradient = np.array(
            [
                *by_scale,
                (outer * signal).sum(),
                np.trace(outer) * noise,
                (outer * signal * self._apart).sum() / length_scale,
            ]
        )
        value = 0.5 * self._values @ weights + np.log(np.diag(factor)).sum()
        away = (at - center) / spread
        return float(value + 0.5 * away @ away), 0.5 * gradient + away / spread


def _matern(squared: Floats) -> tuple[Floats, Floats]:
    """Return the Matern 5/2 covariance of squared distances, and twice its decrease with them."""
    distance = np.sqrt(squared + 1e-12)
    decay = np.exp(-_SQRT5 * distance)
    kernel = (1 + _SQRT5 * distance + 5 / 3 * squared) * decay
    return kernel, 5 / 3 * (1 + _SQRT5 * distance) * decay


def _offsets(apart: Floats) -> Floats:
    """Return the covariance of what all reports of one length have in common."""
    return np.where(apart < 1e-9, _OFFSET_VARIANCE, 0.0)


def _common(expected: Floats, others: Floats) -> Floats:
    """Return the covariance that comes from the weights of the expectations."""
    return _WEIGHT_DEVIATION**2 * expected @ others.T


def choose_longest(lengths: Floats, most: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of so many reports at most: those of the longest trainings, and of the
    shortest among these some at random."""
    if len(lengths) <= most:
        return np.arange(len(lengths))
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    return np.sort(longest_first[:most])


class UnitCube:
    """Parameters of Optuna as coordinates from 0 to 1, each on its own scale.

    A whole number or a choice has an interval of coordinates, and its point is in the middle.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._axes = {key: _axis(each) for key, each in distributions.items()}
        widths = [axis.num_features for axis in self._axes.values()]
        self.groups: NDArray[np.int64] = np.repeat(np.arange(len(widths)), widths)
        """int[features], the index of the key that a feature is of."""

    @property
    def num_keys(self) -> int:
        return len(self._axes)

    def encode(self, params: Mapping[str, Any]) -> Floats:
        """Return the coordinates of a configuration, float[keys]."""
        return np.array([axis.encode(params[key]) for key, axis in self._axes.items()])

    def decode(self, coordinates: Floats) -> dict[str, Any]:
        """Return the configuration at float[keys]."""
        pairs = zip(self._axes.items(), coordinates, strict=True)
        return {key: axis.decode(float(coordinate)) for (key, axis), coordinate in pairs}

    def features(self, coordinates: Floats) -> Floats:
        """Return what distances are measured in, float[n, features], at float[n, keys].

        The ends of a range are 1 apart, and so are any two choices without an order.
        """
        columns = zip(self._axes.values(), coordinates.T, strict=True)
        return np.column_stack([axis.features(column) for axis, column in columns])


class _Range:
    """A number, on its scale."""

    num_features = 1

    def __init__(self, distribution: FloatDistribution | IntDistribution) -> None:
        self._distribution = distribution
        self._ends = self._scaled(distribution.low), self._scaled(distribution.high)
        half = (distribution.step or 0) / 2
        low, high = distribution.low - half, distribution.high + half
        self._edges = self._scaled(low), self._scaled(high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._distribution.log else float(value)

    def encode(self, value: float) -> float:
        low, high = self._edges
        return (self._scaled(value) - low) / (high - low)

    def decode(self, coordinate: float) -> float | int:
        value = float(self._values(np.array([coordinate]))[0])
        return round(value) if isinstance(self._distribution, IntDistribution) else value

    def _values(self, coordinates: Floats) -> Floats:
        low, high = self._edges
        scaled = low + np.clip(coordinates, 0, 1) * (high - low)
        values = np.exp(scaled) if self._distribution.log else scaled
        first, last = self._distribution.low, self._distribution.high
        if step := self._distribution.step:
            values = first + step * np.round((values - first) / step)
        return np.clip(values, first, last)

    def features(self, coordinates: Floats) -> Floats:
        values = self._values(coordinates)
        low, high = self._ends
        scaled = np.log(values) if self._distribution.log else values
        return (scaled - low) / (high - low)


class _Choice:
    """One of some values without an order."""

    def __init__(self, distribution: CategoricalDistribution) -> None:
        self._distribution = distribution
        self.num_features = len(distribution.choices)

    def encode(self, value: Any) -> float:
        index = self._distribution.to_internal_repr(value)
        return (index + 0.5) / self.num_features

    def _indices(self, coordinates: Floats) -> NDArray[np.int64]:
        return np.clip(coordinates * self.num_features, 0, self.num_features - 1).astype(np.int64)

    def decode(self, coordinate: float) -> Any:
        return self._distribution.choices[self._indices(np.array([coordinate]))[0]]

    def features(self, coordinates: Floats) -> Floats:
        return np.eye(self.num_features)[self._indices(coordinates)] / math.sqrt(2)


def _axis(distribution: BaseDistribution) -> _Range | _Choice:
    if isinstance(distribution, CategoricalDistribution):
        return _Choice(distribution)
    assert isinstance(distribution, FloatDistribution | IntDistribution), f"{distribution}"
    return _Range(distribution)
