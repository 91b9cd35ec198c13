"""How far the trials of a search get, by letting its own rule judge made-up ones.

What a scheduler stops depends on the order in which the values of trials arrive, so no formula
gives the number of trials of full length. Here `concurrency` slots train at the same rate, trials
have random quality, and the rule that a real search uses says which of them go on.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanovlm.search.rungs import build_rungs
from nanovlm.search.space import SearchSpace

Judge = Callable[[int, int, float], bool]
"""From the number of a trial, the samples that it has seen and its value: whether it goes on."""

CORRELATIONS = (1.0, 0.8)
"""Of a trial's values with its quality: the order at a milestone is that at the end, or mostly. Two
milestones are correlated by the square of it."""


@dataclass(frozen=True)
class SimulatedSearch:
    """What a search of random trials came to."""

    reached: tuple[int, ...]
    """Trials that reached each milestone, and last those of full length."""
    samples: int
    """Trained in all."""
    num_reports: int
    duration: float
    """In the time of one trained sample: until the last slot has nothing left to do."""


def scheduler_judge(space: SearchSpace, milestones: Sequence[int]) -> Judge:
    """Return the rule of the space's scheduler, with nothing in its rungs."""
    rungs = build_rungs(space, milestones)
    return lambda number, samples_seen, value: rungs.judge(number, samples_seen, value).goes_on


def simulate(
    judge: Judge,
    milestones: Sequence[int],
    trial_samples: int,
    *,
    num_trials: int,
    concurrency: int,
    report_cost: float = 0.0,
    correlation: float = 1.0,
    seed: int = 0,
) -> SimulatedSearch:
    """Return what a search of `num_trials` random trials comes to.

    Args:
        judge: asked at each milestone but the end, in the order in which trials get there.
        report_cost: time of the evaluation at a report, in the time of one trained sample.
        correlation: of a trial's value at a milestone with its quality.
    """
    rng = np.random.default_rng(seed)
    ends = (*milestones, trial_samples)
    quality = rng.standard_normal(num_trials)
    noise = rng.standard_normal((num_trials, len(ends)))
    values = correlation * quality[:, None] + (1 - correlation**2) ** 0.5 * noise
    reached, samples, duration, begun = [0] * len(ends), 0, 0.0, min(concurrency, num_trials)
    # Slots start a little apart, as real ones do: a tie would make their order a matter of chance.
    under_way = [(ends[0] + report_cost + 1e-3 * n, n, 0) for n in range(begun)]
    heapq.heapify(under_way)
    while under_way:
        now, number, rung = heapq.heappop(under_way)
        duration = now
        reached[rung] += 1
        samples += ends[rung] - (ends[rung - 1] if rung else 0)
        if rung + 1 < len(ends) and judge(number, ends[rung], float(values[number, rung])):
            cost = ends[rung + 1] - ends[rung] + report_cost
            heapq.heappush(under_way, (now + cost, number, rung + 1))
        elif begun < num_trials:
            heapq.heappush(under_way, (now + ends[0] + report_cost, begun, 0))
            begun += 1
    return SimulatedSearch(tuple(reached), samples, sum(reached), duration)
