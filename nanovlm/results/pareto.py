"""Which of several trade-offs are worth having: non-dominated fronts, hypervolumes, the knee.

All on *losses*, float[n, k] with k of 1 to 3: a row for each trial, a column for each objective,
less is better (`Objective.loss`). A row dominates another one if it is no worse in any column and
not equal to it.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_BEYOND_NADIR = 0.1
"""So far beyond the front's worst values, as a share of its extent, the reference point lies: the
ends of a front count too then (Ishibuchi et al. 2018, Evolutionary Computation 26(3))."""


def front_ranks(losses: Floats) -> NDArray[np.int64]:
    """Return how many fronts come before each row's, int[n]; 0 is the front of the best.

    A front is what nothing dominates once the fronts before it are taken away (Deb et al. 2002,
    NSGA-II). In lexicographic order a row is dominated by earlier ones alone, so each needs to be
    compared with the fronts so far, by bisection (Zhang et al. 2015, ENS-BS): O(n log n log n).
    """
    unique, inverse = np.unique(losses, axis=0, return_inverse=True)
    fronts = list[_Staircase]()
    ranks = np.zeros(len(unique), dtype=np.int64)
    for place, row in enumerate(unique):
        step = _tail(row)
        low = bisect_left(fronts, True, key=lambda front: not front.is_over(step))
        if low == len(fronts):
            fronts.append(_Staircase())
        fronts[low].add(step)
        ranks[place] = low
    return ranks[inverse.reshape(-1)]


class _Staircase:
    """The lower left edge of points in the plane."""

    def __init__(self) -> None:
        self._xs, self._ys = list[float](), list[float]()  # ascending, descending

    def is_over(self, point: tuple[float, float]) -> bool:
        """Return whether a point of the edge is no worse in both coordinates."""
        place = bisect_right(self._xs, point[0])
        return place > 0 and self._ys[place - 1] <= point[1]

    def add(self, point: tuple[float, float]) -> None:
        """Add a point that the edge is not over."""
        x, y = point
        first = bisect_left(self._xs, x)
        last = first
        while last < len(self._ys) and self._ys[last] >= y:
            last += 1
        self._xs[first:last], self._ys[first:last] = [x], [y]

    def area(self, reference: tuple[float, float]) -> float:
        """Return the area between the edge and a point that is worse than all of it."""
        ends = itertools.pairwise([*self._xs, reference[0]])
        heights = (reference[1] - y for y in self._ys)
        return sum((end - x) * height for (x, end), height in zip(ends, heights, strict=True))


def _tail(row: Floats) -> tuple[float, float]:
    """Return the last two of three losses; of fewer ones the rest is 0."""
    tail = [*map(float, row[1:]), 0.0, 0.0]
    return tail[0], tail[1]


def hypervolume(losses: Floats, reference: Floats) -> float:
    """Return the volume of what is worse than some row and better than the reference, exactly.

    Args:
        reference: float[k]; rows that are not better than it in every column add nothing.
    """
    inside = losses[(losses < reference).all(axis=1)]
    far = float(reference[0])
    corner = (*map(float, reference[1:]), 1.0, 1.0)
    edge, volume = _Staircase(), 0.0
    ordered = inside[np.lexsort(inside.T[::-1])]
    starts = [*map(float, ordered[:, 0]), far]
    for place, row in enumerate(ordered):
        if not edge.is_over(step := _tail(row)):
            edge.add(step)
        volume += (starts[place + 1] - starts[place]) * edge.area((corner[0], corner[1]))
    return volume


def contributions(front: Floats, reference: Floats) -> Floats:
    """Return by how much the hypervolume would shrink without each row of a front, float[n].

    Of equal rows the first one has what they contribute together, the others 0.

    Args:
        reference: float[k], worse than every row in every column.
    """
    unique, first = np.unique(front, axis=0, return_index=True)
    shares = np.zeros(len(front))
    if front.shape[1] == 2:  # a step of the stairs is a rectangle
        ends = np.append(unique[1:, 0], reference[0])
        tops = np.append(reference[1], unique[:-1, 1])
        shares[first] = (ends - unique[:, 0]) * (tops - unique[:, 1])
        return shares
    whole = hypervolume(unique, reference)
    for place, row in enumerate(first):
        shares[row] = whole - hypervolume(np.delete(unique, place, axis=0), reference)
    return shares


@dataclass(frozen=True)
class Box:
    """What losses are measured by: 0 at the best value of each objective on the front, 1 at the
    worst one there."""

    ideal: Floats
    extent: Floats

    @staticmethod
    def around(losses: Floats, least: Sequence[float] | None = None) -> "Box":
        """Return the box of the front of some rows.

        Args:
            least: float[k], what an extent is at least. Values that lie closer together than that
                differ by chance, and are not stretched to the same importance as the others.
        """
        front = losses[front_ranks(losses) == 0]
        ideal = front.min(axis=0)
        extent = np.maximum(front.max(axis=0) - ideal, 0.0 if least is None else np.array(least))
        all_of_them = losses.max(axis=0) - ideal
        extent = np.where(extent > 0, extent, all_of_them)
        return Box(ideal, np.where(extent > 0, extent, 1.0))

    def scaled(self, losses: Floats) -> Floats:
        return (losses - self.ideal) / self.extent

    @property
    def reference(self) -> Floats:
        """The point by which hypervolumes are measured, as losses."""
        return self.ideal + (1 + _BEYOND_NADIR) * self.extent

    def share(self, losses: Floats) -> float:
        """Return the hypervolume of some rows as a share of all from ideal to reference."""
        whole = float(np.prod(self.reference - self.ideal))
        return hypervolume(losses, self.reference) / whole


def best_first(losses: Floats, least: Sequence[float] | None = None) -> list[int]:
    """Return the places of rows, the best first: by front, within one by what they contribute to
    its hypervolume, of equal ones the earlier.

    Args:
        least: see `Box.around`.
    """
    if len(losses) == 0:
        return []
    ranks, box = front_ranks(losses), Box.around(losses, least)
    scaled, worst = box.scaled(losses), 1 + _BEYOND_NADIR
    shares = np.zeros(len(losses))
    for rank in range(int(ranks.max()) + 1):
        here = np.flatnonzero(ranks == rank)
        # A later front lies beyond the box of the first one.
        reference = np.maximum(worst, scaled[here].max(axis=0) + _BEYOND_NADIR)
        shares[here] = contributions(scaled[here], reference)
    return [int(place) for place in np.lexsort((np.arange(len(losses)), -shares, ranks))]


def knee(front: Floats, least: Sequence[float] | None = None) -> int:
    """Return the place of the front's knee: the row that lies furthest below the line (of three
    objectives: the plane) through the ends of the front, where each end is the best in one
    objective and the worst in the others.

    In the units of `Box` this is the row with the smallest sum; of equal ones the first. The knee
    of Das 1999 (Structural Optimization 18, pp. 107-115).

    Args:
        least: see `Box.around`.
    """
    return int(Box.around(front, least).scaled(front).sum(axis=1).argmin())
