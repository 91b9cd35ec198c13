"""Several objectives: which trade-offs are worth having, and which trial a search takes.

Non-dominated fronts, hypervolumes and the knee; the Pareto front of a search.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovlm.config.metrics import least_extent
from nanovlm.config.search_settings import Objective
from nanovlm.messages import TrialRecord, measured

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What a search with several objectives comes to."""

    record: TrialRecord
    how: str
    """`knee`, `bounds`, or `nearest to the bounds`."""
    front: Sequence[TrialRecord]
    """The trials of full length that none of them dominates, the best by the first objective
    first."""
    hypervolume: float
    """Of the front, as a share of what lies between its best values and the reference point."""
    reference: Sequence[float]
    """The reference point, in the objectives' own units."""


def losses(objective: Objective, rows: Sequence[Sequence[float]]) -> Floats:
    """Return float[n, k], less is better, of the values of n trials for k objectives."""
    every = objective.all
    found = [[o.loss(v) for o, v in zip(every, row, strict=True)] for row in rows]
    return np.array(found, dtype=float).reshape(-1, len(every))


def least_extents(objective: Objective) -> list[float]:
    """Return float[k]: see `Box.around`."""
    return [least_extent(each.metric) for each in objective.all]


def order(objective: Objective, rows: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the values of several trials, the best first; of equal ones the earlier.

    With several objectives by front, and within one by the share in its hypervolume.
    """
    return best_first(losses(objective, rows), least_extents(objective))


def values_of(objective: Objective, record: TrialRecord) -> tuple[float, ...] | None:
    """Return the values of a trial's last report, None if it has not all of them."""
    if not record.reports:
        return None
    found = measured(record.reports[-1])
    return objective.values_in(found) if all(o.metric in found for o in objective.all) else None


def choose(records: Sequence[TrialRecord], objective: Objective) -> Choice | None:
    """Return which of the trials of full length a search takes; None if there are none.

    Without bounds the knee of the front (`pareto.knee`); with bounds the best by the first
    objective of the trials that keep them all, or else the trial that is the nearest to keeping
    them, in the units of the front.
    """
    known = [(r, v) for r in records if r.state == "completed" and (v := values_of(objective, r))]
    if not known:
        return None
    completed, values = [record for record, _ in known], [row for _, row in known]
    rows, least = losses(objective, values), least_extents(objective)
    front = np.flatnonzero(front_ranks(rows) == 0)
    front = front[np.lexsort((front, *rows[front].T[::-1]))]
    box = Box.around(rows, least)
    excess = np.array([[_excess(o, v) for o, v in zip(objective.all, r, strict=True)]
                       for r in values])  # fmt: skip
    lacks = (excess / box.extent).sum(axis=1)
    if all(o.bound is None for o in objective.all):
        place, how = int(front[knee(rows[front], least)]), "knee"
    else:
        place = int(np.lexsort((np.arange(len(rows)), *rows.T[::-1], lacks))[0])
        how = "bounds" if lacks[place] == 0 else "nearest to the bounds"
    return Choice(
        record=completed[place],
        how=how,
        front=[completed[each] for each in front],
        hypervolume=box.share(rows),
        reference=[
            each.value_at(float(loss))
            for each, loss in zip(objective.all, box.reference, strict=True)
        ],
    )


def hypervolumes(records: Sequence[TrialRecord], objective: Objective) -> list[float]:
    """Return the hypervolume after each trial, measured as that of all of them is."""
    values = [values_of(objective, r) if r.state == "completed" else None for r in records]
    rows = losses(objective, [row for row in values if row is not None])
    if len(rows) == 0:
        return [0.0] * len(records)
    box = Box.around(rows, least_extents(objective))
    counts = np.cumsum([row is not None for row in values])
    shares = [0.0, *(box.share(rows[: count + 1]) for count in range(len(rows)))]
    return [shares[count] for count in counts]


def describe_choice(choice: Choice, objective: Objective) -> str:
    """Return in a sentence which trial was taken, why, and what else was on the front."""
    number = choice.record.number
    bounds = " and ".join(
        f"{o.metric} {'at most' if o.mode == 'min' else 'at least'} {o.bound:g}"
        for o in objective.all
        if o.bound is not None
    )
    metrics = ", ".join(o.metric for o in objective.all)
    first = objective.metric
    why = {
        "knee": f"trial {number} is the knee of the front of {metrics}",
        "bounds": f"trial {number} has the best {first} of the trials with {bounds}",
        "nearest to the bounds": f"no trial of full length keeps {bounds}; trial {number} is the "
        "nearest to it",
    }[choice.how]
    others = [describe_trial(r, objective) for r in choice.front if r is not choice.record]
    also = f"; also on the front: {'; '.join(others)}" if others else "; the front has no other"
    return f"{why} ({_values_text(choice.record, objective)}){also}"


def describe_values(objective: Objective, values: Sequence[float]) -> str:
    """Return `mmstar_accuracy 0.93, seconds_per_sample 0.0021`."""
    return ", ".join(f"{o.metric} {v:.4g}" for o, v in zip(objective.all, values, strict=True))


def describe_trial(record: TrialRecord, objective: Objective) -> str:
    """Return `trial 7: mmstar_accuracy 0.93, seconds_per_sample 0.0021`."""
    return f"trial {record.number}: {_values_text(record, objective)}"


def pareto_summary(records: Sequence[TrialRecord], objective: Objective) -> dict[str, Any]:
    """Return what `summary.json` has under `pareto`."""
    choice, metrics = choose(records, objective), [each.metric for each in objective.all]
    if choice is None:
        return {"objectives": objective.to_yaml(), "chosen": None, "front": []}
    return {
        "objectives": objective.to_yaml(),
        "chosen": choice.record.number,
        "chosen_by": choice.how,
        "reason": describe_choice(choice, objective),
        "front": [
            {
                "trial_id": record.trial_id,
                "number": record.number,
                "parameters": dict(record.parameters),
                "values": dict(zip(metrics, values_of(objective, record) or (), strict=True)),
            }
            for record in choice.front
        ],
        "hypervolume": choice.hypervolume,
        "reference": dict(zip(metrics, choice.reference, strict=True)),
    }


def _values_text(record: TrialRecord, objective: Objective) -> str:
    return describe_values(objective, values_of(objective, record) or ())


def _excess(objective: Objective, value: float) -> float:
    """Return by how much of its losses a value breaks the bound, 0 if it keeps it."""
    if objective.bound is None:
        return 0.0
    keeps = value <= objective.bound if objective.mode == "min" else value >= objective.bound
    gap = objective.loss(value) - objective.loss(objective.bound)
    return 0.0 if keeps else max(gap, 1e-9)


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
