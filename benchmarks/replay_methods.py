"""The methods that a replay compares."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.replay_clock import Method, Run
from benchmarks.replay_search import our_search, stock_search
from benchmarks.replay_table import CurveTable, coordinate
from nanovlm.search.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method is built from."""

    table: CurveTable
    space: SearchSpace
    seed: int
    concurrency: int
    limit: int
    """Samples that the search may train."""
    folder: Path
    """An empty one."""


Build = Callable[[Setting], Method]


class RandomSearch:
    """Uniform draws from the space, each trained in full."""

    def __init__(self, table: CurveTable, seed: int) -> None:
        self._table = table
        self._random = np.random.default_rng(seed)
        self._ids = itertools.count()

    def start(self) -> Run | None:
        return Run(f"trial-{next(self._ids):04d}", self.draw(), (self._table.last,))

    def report(self, run: Run) -> bool:
        return False

    def draw(self) -> int:
        """Return the row next to a uniform draw; each choice is as likely as another."""
        point = [
            coordinate(p, p.values[self._random.integers(len(p.values))])
            if p.kind == "choice"
            else self._random.uniform()
            for p in self._table.parameters
        ]
        return self._table.nearest_to(np.array(point))


class EpochThenBest(RandomSearch):
    """Random draws trained for one epoch; then the best `num_best` of them go on to the end.

    One epoch is a third of the recorded trainings. How many are drawn follows from what the limit
    leaves when the best have had their two epochs more.
    """

    def __init__(self, table: CurveTable, seed: int, limit: int, num_best: int) -> None:
        super().__init__(table, seed)
        first = table.column_of_share(1 / 3)
        share = table.seen[0, first] / table.budget
        self._num_draws = int((limit / table.budget - num_best * (1 - share)) / share)
        self._columns = (first, table.last)
        self._num_best = num_best
        self._begun: list[Run] = []
        self._waiting: list[Run] | None = None

    def start(self) -> Run | None:
        if len(self._begun) < self._num_draws:
            run = Run(f"trial-{next(self._ids):04d}", self.draw(), self._columns)
            self._begun.append(run)
            return run
        if self._waiting is None and all(run.num_reports for run in self._begun):
            by_value = sorted(self._begun, key=lambda run: -run.value(self._table))
            self._waiting = by_value[: self._num_best]
        return self._waiting.pop(0) if self._waiting else None


def our(sampler: str, scheduler: str, **overrides: object) -> Build:
    """Return what builds this project's search with a sampler and a scheduler."""

    def build(setting: Setting) -> Method:
        space = dataclasses.replace(
            setting.space,
            sampler=setting.space.sampler.model_copy(
                update={"name": sampler, "seed": setting.seed}
            ),
            scheduler=setting.space.scheduler.model_copy(update={"name": scheduler, **overrides}),
        )
        return our_search(setting.table, space, setting.concurrency, setting.folder)

    return build


METHODS: dict[str, Build] = {
    "random, full": lambda s: RandomSearch(s.table, s.seed),
    **{
        f"one epoch, then top {k}": lambda s, k=k: EpochThenBest(s.table, s.seed, s.limit, k)  # type: ignore[misc]
        for k in (1, 2, 3, 4)
    },
    "stock optuna + asha": lambda s: stock_search(s.table, s.space, s.seed),
    "tpe + asha (default)": our("tpe", "asha"),
    "tpe + asha, 4 rungs": our("tpe", "asha", rungs=4),
    "tpe + asha, factor 2": our("tpe", "asha", reduction_factor=2),
    "tpe + hyperband": our("tpe", "hyperband"),
    "tpe + pasha": our("tpe", "pasha"),
    "tpe, full": our("tpe", "none"),
    "gp + asha": our("gp", "asha"),
    "cmaes + asha": our("cmaes", "asha"),
    "qmc + asha": our("qmc", "asha"),
    "random + asha": our("random", "asha"),
}
