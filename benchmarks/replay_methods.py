"""The methods that a replay compares."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.replay_clock import Method, Run
from benchmarks.replay_search import our_search, stock_search
from benchmarks.replay_table import Curves, coordinate
from nanovlm.config.search_settings import Sampler, Scheduler
from nanovlm.config.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method is built from."""

    table: Curves
    space: SearchSpace
    seed: int
    concurrency: int
    limit: int
    """Samples that the search may train."""
    folder: Path
    """An empty one."""
    peer_python: Path | None = None
    """The interpreter of an environment with Syne Tune."""
    exits: ExitStack = dataclasses.field(default_factory=ExitStack)
    """Closed when the search is over."""


Build = Callable[[Setting], Method]


class RandomSearch:
    """Uniform draws from the space, each trained in full."""

    pauses = prepares = False

    def __init__(self, table: Curves, seed: int) -> None:
        self._table = table
        self._random = np.random.default_rng(seed)
        self._ids = itertools.count()

    def start(self) -> Run | None:
        return Run(f"trial-{next(self._ids):04d}", self.draw(), (self._table.last,))

    def report(self, run: Run) -> bool:
        return False

    def seconds(self) -> float:
        return time.process_time()

    def draw(self) -> int:
        """Return the row next to a uniform draw; each choice is as likely as another."""
        point = [
            coordinate(p, p.values[self._random.integers(len(p.values))])
            if p.kind == "choice"
            else self._random.uniform()
            for p in self._table.parameters
        ]
        return self._table.row_at(np.array(point))


class FewThenBest(RandomSearch):
    """Random draws trained for a share of the budget; then the best of them go on to the end.

    How many are drawn follows from what the limit leaves when the best have had the rest. One
    epoch is a third of the recorded trainings.
    """

    pauses = True

    def __init__(
        self, table: Curves, seed: int, limit: int, num_best: int, share: float = 1 / 3
    ) -> None:
        super().__init__(table, seed)
        first = table.column_of_share(share)
        samples = table.samples(0, first)
        self._num_draws = (limit - num_best * (table.budget - samples)) // samples
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


def our(sampler: str, scheduler: str, prepares: bool = False, **overrides: object) -> Build:
    """Return what builds this project's search with a sampler and a scheduler.

    Args:
        prepares: whether the search makes its suggestions while the slots train.
    """

    def build(setting: Setting) -> Method:
        rules = setting.space.scheduler.model_dump() | {"name": scheduler, **overrides}
        space = dataclasses.replace(
            setting.space,
            sampler=Sampler.model_validate({"name": sampler, "seed": setting.seed}),
            scheduler=Scheduler.model_validate(rules),
        )
        return our_search(setting.table, space, setting.concurrency, setting.folder, prepares)

    return build


METHODS: dict[str, Build] = {
    "random, full": lambda s: RandomSearch(s.table, s.seed),
    **{
        f"one epoch, then top {k}": lambda s, k=k: FewThenBest(s.table, s.seed, s.limit, k)  # type: ignore[misc]
        for k in (1, 2, 3, 4)
    },
    "stock optuna + asha": lambda s: stock_search(s.table, s.space, s.seed),
    "auto + asha, pausing": our("auto", "asha", type="pausing", rungs=3),
    "auto + asha, pausing, 4 rungs": our("auto", "asha", type="pausing", rungs=4),
    "random + asha, pausing": our("random", "asha", type="pausing", rungs=3),
    "tpe + asha": our("tpe", "asha", type="stopping"),
    "tpe + asha, 4 rungs": our("tpe", "asha", type="stopping", rungs=4),
    "tpe + asha, factor 2": our("tpe", "asha", type="stopping", reduction_factor=2),
    "tpe + hyperband": our("tpe", "hyperband"),
    "tpe + pasha": our("tpe", "pasha"),
    "tpe, full": our("tpe", "none"),
    "gp + asha": our("gp", "asha", type="stopping"),
    "cmaes + asha": our("cmaes", "asha", type="stopping"),
    "qmc + asha": our("qmc", "asha", type="stopping"),
    "random + asha": our("random", "asha", type="stopping"),
}
