"""The trials that have come to a milestone, the best first; of equal ones the earlier.

One order for one objective and for several (`results/pareto.py: order`). Of one objective it is
kept sorted, since searches of thousands of trials ask for it at every report.
"""

import bisect
from collections.abc import Sequence

from scipy.stats import spearmanr

from nanovlm.config.search_settings import Objective
from nanovlm.results.pareto import order


class Ranking:
    """By one objective."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._keys: dict[int, tuple[float, int]] = {}
        self._sorted: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, number: int, values: Sequence[float]) -> None:
        """Take in a trial with its value of each objective."""
        key = self._objective.loss(values[0]), number
        self._keys[number] = key
        bisect.insort(self._sorted, key)

    def remove(self, number: int) -> None:
        del self._sorted[bisect.bisect_left(self._sorted, self._keys.pop(number))]

    def place(self, number: int) -> int:
        """Return how many trials are better."""
        return bisect.bisect_left(self._sorted, self._keys[number])

    def numbers(self, first: int = 0, last: int | None = None) -> list[int]:
        """Return the trials from one place to before another one."""
        return [number for _, number in self._sorted[first:last]]


class ParetoRanking(Ranking):
    """By several objectives: a trial that comes may move all others."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._values: dict[int, tuple[float, ...]] = {}
        self._order: list[int] | None = None
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, number: int, values: Sequence[float]) -> None:
        self._values[number] = tuple(values)
        self._order = None

    def remove(self, number: int) -> None:
        del self._values[number]
        self._order = None

    def place(self, number: int) -> int:
        self.numbers()
        return self._places[number]

    def numbers(self, first: int = 0, last: int | None = None) -> list[int]:
        if self._order is None:
            by_number = sorted(self._values)
            rows = [self._values[number] for number in by_number]
            self._order = [by_number[place] for place in order(self._objective, rows)]
            self._places = {number: place for place, number in enumerate(self._order)}
        return self._order[first:last]


def make_ranking(objective: Objective) -> Ranking:
    """Return an empty ranking."""
    return Ranking(objective) if len(objective.all) == 1 else ParetoRanking(objective)


def rank_correlation(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's correlation, from -1 to 1; 0 where one side has a single value."""
    if len({*ones}) == 1 or len({*others}) == 1:
        return 0.0
    return float(spearmanr(ones, others).statistic)
