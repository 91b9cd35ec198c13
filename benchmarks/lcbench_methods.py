"""The methods that are compared on LCBench."""

import dataclasses

from benchmarks.lcbench_curves import SAMPLES_PER_EPOCH
from benchmarks.lcbench_transfer import TRANSFERS
from benchmarks.replay_clock import Method
from benchmarks.replay_methods import Build, FewThenBest, RandomSearch, Setting, our
from benchmarks.replay_search import StockRungs, stock_search
from benchmarks.syne_tune_client import syne_tune
from nanovlm.config.search_settings import Scheduler
from nanovlm.config.space import SearchSpace

PLANNED = ("few, then top",)
"""Methods that have to know their compute beforehand, so each amount takes a run of its own."""

PEERS = ("syne tune, asha", "syne tune, mobster")
"""Methods that run in an environment of their own."""

RAY_RUNGS = StockRungs(
    milestones=tuple(epoch * SAMPLES_PER_EPOCH for epoch in (1, 4, 16)),
    iterations=(1, 4, 16, 52),
    reduction_factor=4,
)
"""Of `ASHAScheduler(max_t=52)` with a report after each epoch; everything else is its default."""


def few_then_top(setting: Setting) -> Method:
    """Return random draws trained for 6 of the 52 epochs, then the best of them in full.

    One is trained in full for every 4 trainings of compute, which leaves about three quarters of
    it to the draws.
    """
    num_best = max(1, round(setting.limit / setting.table.budget / 4))
    return FewThenBest(setting.table, setting.seed, setting.limit, num_best, share=6 / 52)


def with_rungs(space: SearchSpace, rungs: int) -> SearchSpace:
    """Return a space whose trials are compared at so many milestones."""
    return dataclasses.replace(space, scheduler=Scheduler(rungs=rungs))


METHODS: dict[str, Build] = {
    "random, full": lambda s: RandomSearch(s.table, s.seed),
    "few, then top": few_then_top,
    "stock optuna + asha": lambda s: stock_search(s.table, with_rungs(s.space, 3), s.seed),
    "stock optuna + asha, its rungs": lambda s: stock_search(s.table, s.space, s.seed, RAY_RUNGS),
    "tpe + asha, stopping": our("tpe", "asha", type="stopping", rungs=3),
    "random + asha, stopping": our("random", "asha", type="stopping", rungs=3),
    "auto + asha, pausing": our("auto", "asha", type="pausing", rungs=3),
    "auto + asha, pausing, 4 rungs": our("auto", "asha", type="pausing", rungs=4),
    "random + asha, pausing": our("random", "asha", type="pausing", rungs=3),
    "tpe + asha, pausing": our("tpe", "asha", type="pausing", rungs=3),
    "syne tune, asha": syne_tune("asha"),
    "syne tune, mobster": syne_tune("mobster"),
    **TRANSFERS,
}
