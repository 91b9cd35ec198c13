"""The configurations of a search space as points in the unit cube, for models of the objective."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Floats = NDArray[np.float64]


class UnitCube:
    """Parameters of Optuna as coordinates from 0 to 1, each on its own scale.

    A whole number or a choice has an interval of coordinates, and its point is in the middle.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._axes = {key: _axis(each) for key, each in distributions.items()}
        widths = [axis.num_features for axis in self._axes.values()]
        self.groups: NDArray[np.int64] = np.repeat(np.arange(len(widths)), widths)
        """int[features], the place of the key that a feature is of."""

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
        self._is_whole = isinstance(distribution, IntDistribution)
        self._step = distribution.step or 0
        self._ends = self._scaled(distribution.low), self._scaled(distribution.high)
        half = self._step / 2
        self._edges = (
            self._scaled(distribution.low - half),
            self._scaled(distribution.high + half),
        )

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._distribution.log else float(value)

    def encode(self, value: float) -> float:
        low, high = self._edges
        return (self._scaled(value) - low) / (high - low)

    def decode(self, coordinate: float) -> float | int:
        value = float(self._values(np.array([coordinate]))[0])
        return round(value) if self._is_whole else value

    def _values(self, coordinates: Floats) -> Floats:
        low, high = self._edges
        scaled = low + np.clip(coordinates, 0, 1) * (high - low)
        values = np.exp(scaled) if self._distribution.log else scaled
        first, last = self._distribution.low, self._distribution.high
        if self._step:
            values = first + self._step * np.round((values - first) / self._step)
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
        place = self._distribution.to_internal_repr(value)
        return (place + 0.5) / self.num_features

    def _places(self, coordinates: Floats) -> NDArray[np.int64]:
        return np.clip(coordinates * self.num_features, 0, self.num_features - 1).astype(np.int64)

    def decode(self, coordinate: float) -> Any:
        return self._distribution.choices[self._places(np.array([coordinate]))[0]]

    def features(self, coordinates: Floats) -> Floats:
        return np.eye(self.num_features)[self._places(coordinates)] / math.sqrt(2)


def _axis(distribution: BaseDistribution) -> _Range | _Choice:
    if isinstance(distribution, CategoricalDistribution):
        return _Choice(distribution)
    assert isinstance(distribution, FloatDistribution | IntDistribution), f"{distribution}"
    return _Range(distribution)
