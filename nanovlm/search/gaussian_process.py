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
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
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
    """Return the places of so many reports at most: those of the longest trainings, and of the
    shortest among these some at random."""
    if len(lengths) <= most:
        return np.arange(len(lengths))
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    return np.sort(longest_first[:most])
