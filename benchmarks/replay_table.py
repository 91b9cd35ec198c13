"""The learning curves that a replay looks trials up in, and those of them that were recorded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nanovlm.config.parameter import Parameter


class Curves(Protocol):
    """Learning curves by row (a configuration) and column (a point of its training).

    The last column is the end of a full training. A higher value is better.
    """

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    @property
    def budget(self) -> int:
        """Samples of a full training."""
        ...

    @property
    def last(self) -> int:
        """The column of the end."""
        ...

    def row_of(self, values: Mapping[str, Any]) -> int:
        """Return the row that a trial with these values has."""
        ...

    def row_at(self, point: np.ndarray) -> int:
        """Return the row that a trial at float[parameters] in the unit cube has."""
        ...

    def samples(self, row: int, column: int) -> int:
        """Return the samples seen at a report."""
        ...

    def value(self, row: int, column: int) -> float:
        """Return the objective as it is reported."""
        ...

    def column(self, row: int, milestone: int) -> int:
        """Return the first column in which this row has seen so many samples."""
        ...

    def column_of_share(self, share: float) -> int:
        """Return the first column in which every row has seen this share of the budget."""
        ...


@runtime_checkable
class TradeoffCurves(Curves, Protocol):
    """Curves of several objectives."""

    def others(self, row: int, column: int) -> Sequence[float]:
        """Return the values of the objectives but the first at a report."""
        ...


@dataclass(frozen=True)
class CurveTable:
    """Configurations that were trained in full, with their value at some points on the way.

    Every configuration (row) has a report at the same parts of the budget (columns); the last
    column is the end. A higher value is better.
    """

    parameters: tuple[Parameter, ...]
    points: np.ndarray
    """float[rows, parameters]: the configurations in the unit cube, see `coordinate`."""
    seen: np.ndarray
    """int[rows, columns]: samples seen at each report, ascending in a row."""
    values: np.ndarray
    """float[rows, columns]: the objective at each report."""

    def __len__(self) -> int:
        return len(self.points)

    @property
    def budget(self) -> int:
        """Samples of a full training."""
        return int(self.seen[0, -1])

    @property
    def last(self) -> int:
        """The column of the end."""
        return self.seen.shape[1] - 1

    def row_of(self, values: Mapping[str, Any]) -> int:
        """Return the row that is nearest to these values in the unit cube, the first of equals."""
        return self.row_at(np.array([coordinate(p, values[p.key]) for p in self.parameters]))

    def row_at(self, point: np.ndarray) -> int:
        """Return the row that is nearest to float[parameters] in the unit cube."""
        return int(np.argmin(((self.points - point) ** 2).sum(axis=1)))

    def samples(self, row: int, column: int) -> int:
        """Return the samples seen at a report."""
        return int(self.seen[row, column])

    def value(self, row: int, column: int) -> float:
        """Return the objective at a report."""
        return float(self.values[row, column])

    def column_of_share(self, share: float) -> int:
        """Return the first column in which every row has seen this share of the budget."""
        return int(np.argmax((self.seen >= share * self.budget - 0.5).all(axis=0)))

    def column(self, row: int, milestone: int) -> int:
        """Return the first column in which this row has seen so many samples."""
        return int(np.searchsorted(self.seen[row], milestone))

    def regret(self, row: int) -> float:
        """Return what the row's full training lacks to the best of the table."""
        finals = self.values[:, -1]
        return float(finals.max() - finals[row])

    def part(self, rows: Sequence[int] | np.ndarray) -> "CurveTable":
        """Return the table of some of the rows."""
        return CurveTable(self.parameters, self.points[rows], self.seen[rows], self.values[rows])


def load_curves(path: Path, parameters: tuple[Parameter, ...]) -> CurveTable:
    """Return the table of a file that `record_curves.py` wrote, in the order of the numbers."""
    curves = [json.loads(line) for line in path.read_text().splitlines()]
    curves.sort(key=lambda curve: curve["number"])
    failed = [curve["number"] for curve in curves if "failure" in curve]
    assert not failed, f"a replay has no failed trials, but {failed} failed"
    reports = np.array([curve["reports"] for curve in curves])
    points = [[coordinate(p, curve["parameters"][p.key]) for p in parameters] for curve in curves]
    return CurveTable(parameters, np.array(points), reports[..., 0].astype(int), reports[..., 1])


def coordinate(parameter: Parameter, value: Any) -> float:
    """Return where a value lies in its range, from 0 to 1 and on the range's own scale.

    Choices are taken as equally spaced in their order, which is right for batch sizes and other
    choices that have one.
    """
    if parameter.kind == "choice":
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    ends = np.array(parameter.values, dtype=float)
    if parameter.kind.startswith("log_"):
        ends, value = np.log(ends), np.log(value)
    return float((value - ends[0]) / (ends[1] - ends[0]))


def value_at(parameter: Parameter, place: float) -> Any:
    """Return the value that lies at a place from 0 to 1, which is what `coordinate` undoes."""
    return values_at(parameter, np.array([place])).tolist()[0]


def values_at(parameter: Parameter, places: np.ndarray) -> np.ndarray:
    """Return the values that lie at float[n] places from 0 to 1."""
    if parameter.kind == "choice":
        numbers = np.rint(places * (len(parameter.values) - 1)).astype(int)
        return np.array(parameter.values, dtype=object)[numbers]
    low, high = np.array(parameter.values, dtype=float)
    if parameter.kind.startswith("log_"):
        values = low * (high / low) ** places
    else:
        values = low + (high - low) * places
    return np.rint(values).astype(int) if parameter.kind.endswith("int") else values
