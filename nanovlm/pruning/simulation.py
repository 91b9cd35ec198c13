"""How far the trials of a search get, by letting its own rule decide on simulated ones.

What a scheduler stops depends on the order in which the values of trials arrive, so no formula
gives the number of trials of full length, or of those that wait. Here `concurrency` slots train at
the same rate, trials have random quality, and the rule that a real search uses says which go on.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.pruning.successive_halving import SuccessiveHalving

CORRELATIONS = (1.0, 0.8)
"""Of a trial's values with its quality: the order at a milestone is that at the end, or mostly. Two
milestones are correlated by the square of it."""


@dataclass
class SimulatedSearch:
    """The outcome of a search of random trials."""

    reached: list[int]
    """Trials that reached each milestone, and last those of full length."""
    samples: int = 0
    """Trained in all."""
    num_reports: int = 0
    duration: float = 0.0
    """In the time of one trained sample: until the last slot has nothing left to do."""
    most_paused: int = 0
    """Trials that waited at a time, at most."""
    num_retrained: int = 0
    """Times that a trial went on whose state was not kept, and trained again from its start."""


def simulate(
    rule: SuccessiveHalving,
    milestones: Sequence[int],
    trial_samples: int,
    *,
    num_trials: int,
    concurrency: int,
    report_cost: float = 0.0,
    correlation: float = 1.0,
    most_states: int | None = None,
    seed: int = 0,
) -> SimulatedSearch:
    """Return the outcome of a search of `num_trials` random trials.

    Args:
        rule: asked at each milestone but the end, in the order in which trials get there.
        report_cost: time of the evaluation at a report, in the time of one trained sample.
        correlation: of a trial's value at a milestone with its quality.
        most_states: of paused trials that are kept; None keeps all.
    """
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal(num_trials)
    noise = rng.standard_normal((num_trials, len(milestones) + 1))
    values = correlation * quality[:, None] + (1 - correlation**2) ** 0.5 * noise
    search = _Search(rule, (*milestones, trial_samples), values, report_cost, most_states)
    return search.run(concurrency)


@dataclass
class _Search:
    """A simulated search in progress."""

    rule: SuccessiveHalving
    ends: tuple[int, ...]
    """Samples seen at the reports of a trial."""
    values: NDArray[np.float64]
    """float[trials, reports]"""
    report_cost: float
    most_states: int | None
    under_way: list[tuple[float, int, int]] = field(default_factory=list)
    """Time of its next report, number and rung of each running trial; a heap."""
    num_begun: int = 0
    without_state: set[int] = field(default_factory=set)
    """Paused trials whose states are not kept."""

    def run(self, concurrency: int) -> SimulatedSearch:
        self.outcome = SimulatedSearch(reached=[0] * len(self.ends))
        free = concurrency
        while True:
            now = self.outcome.duration
            # Slots start a little apart, as real ones do: else chance would make their order.
            while free and self._begin_next(now + (1e-3 * self.num_begun if now == 0 else 0)):
                free -= 1
            if not self.under_way:
                return self.outcome
            self.outcome.duration, number, rung = heapq.heappop(self.under_way)
            free += not self._goes_on(number, rung)

    def _goes_on(self, number: int, rung: int) -> bool:
        """Let a trial report; return whether its slot goes on with it."""
        self.outcome.reached[rung] += 1
        if rung + 1 == len(self.ends):
            return False
        decision = self.rule.decide(number, self.ends[rung], float(self.values[number, rung]))
        if decision.goes_on:
            self._begin(self.outcome.duration, number, rung + 1)
        elif isinstance(self.rule, PausingHalving):
            self.outcome.most_paused = max(self.outcome.most_paused, len(self.rule.paused))
        return decision.goes_on

    def _begin_next(self, now: float) -> bool:
        """Let a free slot take what a searcher would give it; return whether there is something."""
        has_new = self.num_begun < len(self.values)
        if isinstance(self.rule, PausingHalving):
            promoted, _, let_go = self.rule.fill_slot(
                is_last=not has_new, most_trials=len(self.values), max_states=self.most_states
            )
            self.without_state.update(let_go)
            if promoted is not None:
                self._begin(now, promoted.number, self.ends.index(promoted.milestone) + 1)
                return True
        if has_new:
            self._begin(now, self.num_begun, 0)
            self.num_begun += 1
        return has_new

    def _begin(self, now: float, number: int, rung: int) -> None:
        """Train a trial until its next report, from its last one if its state was kept."""
        first = rung if rung > 0 and number not in self.without_state else 0
        samples = self.ends[rung] - (self.ends[first - 1] if first else 0)
        num_reports = rung + 1 - first
        self.outcome.num_retrained += number in self.without_state
        self.without_state.discard(number)
        self.outcome.samples += samples
        self.outcome.num_reports += num_reports
        done = now + samples + num_reports * self.report_cost
        heapq.heappush(self.under_way, (done, number, rung))
