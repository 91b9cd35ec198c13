"""The methods that are compared on LCBench."""

from benchmarks.replay_clock import Method
from benchmarks.replay_methods import Build, FewThenBest, RandomSearch, Setting, our
from benchmarks.replay_search import stock_search

PLANNED = ("few, then top",)
"""Methods that have to know their compute beforehand, so each amount takes a run of its own."""


def few_then_top(setting: Setting) -> Method:
    """Return random draws trained for 6 of the 52 epochs, then the best of them in full.

    One is trained in full for every 4 trainings of compute, which leaves about three quarters of
    it to the draws.
    """
    num_best = max(1, round(setting.limit / setting.table.budget / 4))
    return FewThenBest(setting.table, setting.seed, setting.limit, num_best, share=6 / 52)


METHODS: dict[str, Build] = {
    "random, full": lambda s: RandomSearch(s.table, s.seed),
    "few, then top": few_then_top,
    "stock optuna + asha": lambda s: stock_search(s.table, s.space, s.seed),
    "tpe + asha, stopping": our("tpe", "asha", rungs=3),
    "random + asha, stopping": our("random", "asha", rungs=3),
    "auto + asha, pausing": our("auto", "asha", type="pausing", rungs=3),
    "auto + asha, pausing, 4 rungs": our("auto", "asha", type="pausing", rungs=4),
    "random + asha, pausing": our("random", "asha", type="pausing", rungs=3),
    "tpe + asha, pausing": our("tpe", "asha", type="pausing", rungs=3),
}
