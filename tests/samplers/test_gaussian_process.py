"""The Gaussian process over configurations and milestones, against references."""

import math

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.optimize import approx_fprime
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from nanovlm.samplers.gaussian_process import (
    Expectation,
    GaussianProcess,
    UnitCube,
    _NegativeLogPosterior,
    choose_longest,
)
from nanovlm.samplers.milestone_sampler import log_expected_improvement

GROUPS = np.array([0, 1, 2, 2])


def reports(num: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    points, lengths = random.random((num, 4)), random.choice([-2.0, -1.0, 0.0], num)
    values = np.sin(3 * points[:, 0]) + 0.3 * lengths + 0.1 * random.normal(size=num)
    return points, lengths, (values - values.mean()) / values.std()


def test_the_gradient_is_that_of_the_posterior() -> None:
    expected = np.random.default_rng(0).normal(size=(40, 2))
    objective = _NegativeLogPosterior(*reports(), GROUPS, num_keys=3, expected=expected)
    center, spread = np.full(6, -0.2), np.linspace(0.5, 2, 6)
    at = np.random.default_rng(1).normal(size=6) * 0.3
    _, gradient = objective(at, center, spread)
    numeric = approx_fprime(at, lambda x: objective(x, center, spread)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)


def test_the_posterior_is_scikit_learns() -> None:
    """With one length only; the offset is a constant there."""
    points, _, values = reports()
    groups = np.arange(4)
    process = GaussianProcess(points, np.zeros(len(points)), values, groups)
    kernel = (
        ConstantKernel(process._variance) * Matern(process.scales, nu=2.5)
        + ConstantKernel(1.0)
        + WhiteKernel(process._noise)
    )
    reference = GaussianProcessRegressor(kernel, optimizer=None, alpha=1e-8).fit(points, values)
    others = np.random.default_rng(2).random((20, 4))
    mean, deviation = reference.predict(others, return_std=True)
    ours, spread = process.predict(others, 0.0)
    np.testing.assert_allclose(ours, mean, atol=1e-5)
    np.testing.assert_allclose(spread**2, deviation**2 - process._noise, atol=1e-5)


def test_what_counts_is_found_out_and_early_values_tell_of_late_ones() -> None:
    random = np.random.default_rng(3)
    points = random.random((60, 2))
    truth = np.sin(6 * points[:, 0])
    lengths = np.where(np.arange(60) < 50, -1.0, 0.0)
    values = truth + 2.0 * (lengths == 0)  # the level grows with the training
    values = (values - values.mean()) / values.std()
    process = GaussianProcess(points, lengths, values, np.arange(2))
    assert process.scales[1] > 3 * process.scales[0]
    others = random.random((50, 2))
    mean, _ = process.predict(others, 0.0)
    assert np.corrcoef(mean, np.sin(6 * others[:, 0]))[0, 1] > 0.98


def errors_with(*expectations: Expectation) -> float:
    """Return the mean error of a process of eight values, whose truth is a sine."""
    random = np.random.default_rng(4)
    points, others = random.random((8, 3)), random.random((50, 3))
    values = np.sin(6 * points[:, 0])
    groups, lengths = np.arange(3), np.zeros(8)
    process = GaussianProcess(points, lengths, values, groups, 0, expectations)
    mean, _ = process.predict(others, 0.0)
    return float(np.abs(mean - np.sin(6 * others[:, 0])).mean())


def test_what_others_expect_counts_as_much_as_the_values_say() -> None:
    alone = errors_with()
    assert errors_with(lambda points: np.sin(6 * points[:, 0])) < 0.1 * alone
    assert errors_with(lambda points: -2 * np.sin(6 * points[:, 0])) < 0.3 * alone
    assert errors_with(lambda points: np.sin(6 * points[:, 1])) < 1.2 * alone
    both = errors_with(
        lambda points: np.sin(6 * points[:, 1]), lambda points: np.sin(6 * points[:, 0])
    )
    assert both < 0.2 * alone


def test_before_there_are_values_it_is_what_others_expect() -> None:
    none, groups = np.zeros(0), np.arange(2)
    process = GaussianProcess(np.zeros((0, 2)), none, none, groups, 0, [lambda p: p[:, 0]])
    points = np.array([[0.1, 0.5], [0.9, 0.2], [0.4, 0.4]])
    mean, deviation = process.predict(points, 0.0)
    assert list(np.argsort(mean)) == [0, 2, 1]
    process.believe(points[:1], 0.0)
    assert process.predict(points, 0.0)[1][0] < 0.5 * deviation[0]


def test_a_trial_under_way_is_believed_to_come_to_its_mean() -> None:
    points, lengths, values = reports()
    process = GaussianProcess(points, lengths, values, GROUPS)
    new = np.full((1, 4), 0.5)
    mean, before = process.predict(new, -2.0)
    process.believe(new, -2.0)
    again, after = process.predict(new, -2.0)
    np.testing.assert_allclose(again, mean, atol=1e-6)
    assert after < 0.8 * before
    process.believe(np.empty((0, 4)), -2.0)


def test_of_many_reports_the_longest_trainings_are_taken() -> None:
    lengths = np.repeat([-2.0, -1.0, 0.0], [300, 100, 20])
    chosen = choose_longest(lengths, 150, seed=0)
    assert len(chosen) == len(set(chosen)) == 150
    assert (lengths[chosen] == 0).sum() == 20 and (lengths[chosen] == -1).sum() == 100
    assert list(choose_longest(lengths[:10], 150, 0)) == list(range(10))


@pytest.mark.parametrize("z", [-50.0, -6.0, -1.001, -0.999, 0.0, 3.0])
def test_the_expected_improvement(z: float) -> None:
    (ours,) = log_expected_improvement(np.array([1.0 + 2 * z]), np.array([2.0]), 1.0)
    if z > -10:
        exact = math.log(2 * (norm.pdf(z) + z * norm.cdf(z)))
        assert ours == pytest.approx(exact, rel=1e-6)
    else:  # phi(z) / z^2 far below the best
        assert ours == pytest.approx(norm.logpdf(z) - 2 * math.log(-z) + math.log(2), abs=1e-2)


DISTRIBUTIONS = {
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 0.5),
    "layers": IntDistribution(1, 5),
    "units": IntDistribution(64, 1024, log=True),
    "freeze": CategoricalDistribution(("none", "encoder", "backbones")),
}


def test_a_configuration_comes_back_from_the_cube() -> None:
    cube = UnitCube(DISTRIBUTIONS)
    random = np.random.default_rng(0)
    for coordinates in random.random((50, 5)):
        params = cube.decode(coordinates)
        for key, value in params.items():
            assert DISTRIBUTIONS[key]._contains(DISTRIBUTIONS[key].to_internal_repr(value))
        assert _same(cube.decode(cube.encode(params)), params)
        np.testing.assert_allclose(
            cube.features(cube.encode(params)[None]), cube.features(coordinates[None]), atol=1e-9
        )


def _same(one: dict, other: dict) -> bool:
    return all(
        math.isclose(one[key], other[key])
        if isinstance(one[key], float)
        else one[key] == other[key]
        for key in other
    )


def test_distances_are_those_of_ranges_and_choices() -> None:
    cube = UnitCube(DISTRIBUTIONS)
    low = {"rate": 1e-4, "decay": 0.0, "layers": 1, "units": 64, "freeze": "none"}
    high = {"rate": 1e-1, "decay": 0.5, "layers": 5, "units": 1024, "freeze": "backbones"}
    features = cube.features(np.array([cube.encode(low), cube.encode(high)]))
    apart = (features[0] - features[1]) ** 2
    assert list(cube.groups) == [0, 1, 2, 3, 4, 4, 4]
    np.testing.assert_allclose(np.bincount(cube.groups, apart), np.ones(5))


@pytest.mark.parametrize("key", ["layers", "freeze"])
def test_every_value_is_as_likely_as_another(key: str) -> None:
    cube = UnitCube({key: DISTRIBUTIONS[key]})
    drawn = [cube.decode(np.array([place]))[key] for place in np.linspace(0, 1, 3001)]
    counts = np.unique(drawn, return_counts=True)[1]
    assert counts.max() - counts.min() <= 2
