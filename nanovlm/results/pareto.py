"""Several objectives: which trade-offs are worth having, and which trial a search takes.

Non-dominated fronts, hypervolumes and the knee; the Pareto front of a search.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovlm.config.metrics import least_extent
from nanovlm.config.search_settings import Objective
from nanovlm.messages import TrialRecord, measured

Floats = NDArray[np.float64]

_BEYOND_NADIR = 0.1
"""So far beyond the front's worst values, as a share of its extent, the reference point lies: the
ends of a front count too then (Ishibuchi et al. 2018, Evolutionary Computation 26(3))."""


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
    """Return the indices of the values of several trials, the best first; of equal ones the
    earlier. With several objectives by front, and within one by the share in its hypervolume."""
    return best_first(losses(objective, rows), least_extents(objective))


class Ranking:
    """The trials that have come to a milestone, in the order of `order`; of equal ones the one with
    the lower number is the better one.

    Of one objective the order is kept up to date, since searches of thousands of trials ask for it
    at every report. Of several objectives each trial may move all others.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._is_single = len(objective.all) == 1
        self._values: dict[int, tuple[float, ...]] = {}
        self._order: list[int] = []  # of several objectives empty until it is asked for

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, number: int) -> bool:
        return number in self._values

    def add(self, number: int, values: Sequence[float]) -> None:
        """Take in a trial with its value of each objective."""
        self._values[number] = tuple(values)
        if self._is_single:
            bisect.insort(self._order, number, key=self._key)
        else:
            self._order = []

    def remove(self, number: int) -> None:
        if self._is_single:
            del self._order[self.index(number)]
        else:
            self._order = []
        del self._values[number]

    def index(self, number: int) -> int:
        """Return how many trials are better."""
        return self._place(self._key(number)) if self._is_single else self.numbers().index(number)

    def numbers(self, first: int = 0, last: int | None = None) -> list[int]:
        """Return the trials from one index to before another one."""
        if self._values and not self._order:
            numbers = sorted(self._values)
            rows = [self._values[number] for number in numbers]
            self._order = [numbers[index] for index in order(self._objective, rows)]
        return self._order[first:last]

    def among(self, some: "Ranking", first: int = 0, last: int | None = None) -> list[int]:
        """Return those of `numbers(first, last)` that are in a ranking of some of these trials."""
        if not self._is_single:
            return [number for number in self.numbers(first, last) if number in some]

        def place(index: int) -> int:
            whole = index >= len(self)
            return len(some) if whole else some._place(self._key(self._order[index]))

        return some._order[place(first) : place(len(self) if last is None else last)]

    def _place(self, key: tuple[float, int]) -> int:
        return bisect.bisect_left(self._order, key, key=self._key)

    def _key(self, number: int) -> tuple[float, int]:
        return self._objective.loss(self._values[number][0]), number


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
    by_first = np.lexsort(rows.T[::-1])  # stable: of equal ones the earlier
    front = by_first[front_ranks(rows)[by_first] == 0]
    box = Box.around(rows, least)
    excess = [[_excess(o, v) for o, v in zip(objective.all, row, strict=True)] for row in values]
    lacks = (np.array(excess) / box.extent).sum(axis=1)
    if all(o.bound is None for o in objective.all):
        chosen, how = front[knee(rows[front], least)], "knee"
    else:
        chosen = by_first[lacks[by_first].argmin()]
        how = "bounds" if lacks[chosen] == 0 else "nearest to the bounds"
    reference = zip(objective.all, box.reference.tolist(), strict=True)
    return Choice(
        record=completed[chosen],
        how=how,
        front=[completed[index] for index in front],
        hypervolume=box.share(rows),
        reference=[each.value_at(loss) for each, loss in reference],
    )


def hypervolumes(records: Sequence[TrialRecord], objective: Objective) -> list[float]:
    """Return the hypervolume after each trial, measured as that of all of them is."""
    values = [values_of(objective, r) if r.state == "completed" else None for r in records]
    rows = losses(objective, [row for row in values if row is not None])
    if len(rows) == 0:
        return [0.0] * len(records)
    box = Box.around(rows, least_extents(objective))
    counts = np.cumsum([row is not None for row in values])
    shares = [box.share(rows[:count]) for count in range(len(rows) + 1)]
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
    shown = {r.number: describe_values(objective, values_of(objective, r) or ())
             for r in (choice.record, *choice.front)}  # fmt: skip
    others = [f"trial {n}: {values}" for n, values in shown.items() if n != number]
    also = f"; also on the front: {'; '.join(others)}" if others else "; the front has no other"
    return f"{why} ({shown[number]}){also}"


def describe_values(objective: Objective, values: Sequence[float]) -> str:
    """Return `mmstar_accuracy 0.93, seconds_per_sample 0.0021`."""
    return ", ".join(f"{o.metric} {v:.4g}" for o, v in zip(objective.all, values, strict=True))


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


def _excess(objective: Objective, value: float) -> float:
    """Return by how much of its losses a value breaks the bound, 0 if it keeps it."""
    if objective.bound is None:
        return 0.0
    keeps = value <= objective.bound if objective.mode == "min" else value >= objective.bound
    gap = objective.loss(value) - objective.loss(objective.bound)
    return 0.0 if keeps else max(gap, 1e-9)


def front_ranks(losses: Floats) -> NDArray[np.int64]:
    """Return how many fronts come before each row's, int[n]; 0 is the front of the best.

    A front is what nothing dominates once the fronts before it are taken away (Deb et al. 2002,
    NSGA-II): a row is one front behind the last of those that dominate it. In lexicographic order
    only earlier rows do. Two columns take O(n log n), three O(n^2).
    """
    unique, inverse = np.unique(losses, axis=0, return_inverse=True)
    ranks = np.zeros(len(unique), dtype=np.int64)
    least = list[float]()  # of the second losses in each front, ascending
    for index, row in enumerate(unique):
        if len(row) == 3:
            dominating = (unique[:index, 1:] <= row[1:]).all(axis=1)
            ranks[index] = 1 + ranks[:index][dominating].max(initial=-1)
        else:
            last = float(row[-1])
            ranks[index] = rank = bisect.bisect_right(least, last)
            least[rank : rank + 1] = [last]
    return ranks[inverse.reshape(-1)]


def hypervolume(losses: Floats, reference: Floats) -> float:
    """Return the volume of what is worse than some row and better than the reference, exactly.

    Args:
        losses: float[n, k] with k from 1 to 3.
        reference: float[k]; rows that are not better than it in every column add nothing.
    """
    inside = losses[(losses < reference).all(axis=1)]
    inside = inside[inside[:, 0].argsort(kind="stable")]
    widths = np.diff(inside[:, 0], append=reference[0])  # of slices along the first column
    if losses.shape[1] == 1:
        return float(widths.sum())
    if losses.shape[1] == 2:
        return float(widths @ (reference[1] - np.minimum.accumulate(inside[:, 1])))
    second = inside[:, 1].argsort(kind="stable")
    is_in_slice = second <= np.arange(len(inside))[:, None]  # bool[slices, rows]
    thirds = np.where(is_in_slice, inside[second, 2], reference[2])
    heights = reference[2] - np.minimum.accumulate(thirds, axis=1)
    return float(widths @ heights @ np.diff(inside[second, 1], append=reference[1]))


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
    for index, row in enumerate(first):
        shares[row] = whole - hypervolume(np.delete(unique, index, axis=0), reference)
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
        extent = np.where(extent > 0, extent, losses.max(axis=0) - ideal)
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
    """Return the indices of rows, the best first: by front, within one by what they contribute to
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
        here = ranks == rank
        # A later front lies beyond the box of the first one.
        reference = np.maximum(worst, scaled[here].max(axis=0) + _BEYOND_NADIR)
        shares[here] = contributions(scaled[here], reference)
    return [int(index) for index in np.lexsort((-shares.round(12), ranks))]  # stable


def knee(front: Floats, least: Sequence[float] | None = None) -> int:
    """Return the index of the front's knee: the row that lies furthest below the line (of three
    objectives: the plane) through the ends of the front, where each end is the best in one
    objective and the worst in the others.

    In the units of `Box` this is the row with the smallest sum; of equal ones the first. The knee
    of Das 1999 (Structural Optimization 18, pp. 107-115).

    Args:
        least: see `Box.around`.
    """
    return int(Box.around(front, least).scaled(front).sum(axis=1).argmin())
