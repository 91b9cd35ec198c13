"""How far the trials of a search get, by letting its own rule decide on simulated ones.

What a scheduler stops depends on the order in which the values of trials arrive, so no formula
gives the number of trials of full length, or of those that wait. Here `concurrency` slots train at
the same rate, trials have random quality, and the rule that a real search uses says which go on.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.pruning.successive_halving import SuccessiveHalving

CORRELATIONS = (1.0, 0.8)
"""Of a trial's values with its quality: the order at a milestone is that at the end, or mostly. Two
milestones are correlated by the square of it."""


@dataclass(frozen=True)
class SimulatedSearch:
    """The outcome of a search of random trials."""

    reached: tuple[int, ...]
    """Trials that reached each milestone, and last those of full length."""
    samples: int
    """Trained in all."""
    num_reports: int
    duration: float
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


class _Search:
    """A simulated search in progress."""

    def __init__(
        self,
        rule: SuccessiveHalving,
        ends: tuple[int, ...],
        values: np.ndarray,
        report_cost: float,
        most_states: int | None,
    ) -> None:
        """
        Args:
            ends: samples seen at the reports of a trial.
            values: float[trials, reports].
        """
        self._rule = rule
        self._pausing = rule if isinstance(rule, PausingHalving) else None
        self._ends = ends
        self._values = values
        self._report_cost = report_cost
        self._most_states = most_states
        self._under_way: list[tuple[float, int, int]] = []  # time of the report, trial, its rung
        self._num_begun = 0
        self._without_state: set[int] = set()  # of the paused trials
        self._reached = [0] * len(ends)
        self._samples = self._num_reports = self._most_paused = self._num_retrained = 0

    def run(self, concurrency: int) -> SimulatedSearch:
        now, free = 0.0, concurrency
        while True:
            # Slots start a little apart, as real ones do: else chance would make their order.
            while free and self._begin_next(now + (1e-3 * self._num_begun if now == 0 else 0)):
                free -= 1
            if not self._under_way:
                break
            now, number, rung = heapq.heappop(self._under_way)
            free += not self._goes_on(now, number, rung)
        return SimulatedSearch(
            tuple(self._reached),
            self._samples,
            self._num_reports,
            duration=now,
            most_paused=self._most_paused,
            num_retrained=self._num_retrained,
        )

    def _goes_on(self, now: float, number: int, rung: int) -> bool:
        """Let a trial report; return whether its slot goes on with it."""
        self._reached[rung] += 1
        if rung + 1 == len(self._ends):
            return False
        decision = self._rule.decide(number, self._ends[rung], float(self._values[number, rung]))
        if decision.goes_on:
            self._begin(now, number, rung + 1)
        elif self._pausing is not None:
            self._most_paused = max(self._most_paused, len(self._pausing.paused))
        return decision.goes_on

    def _begin_next(self, now: float) -> bool:
        """Let a free slot take what a searcher would give it; return whether there is something."""
        has_new = self._num_begun < len(self._values)
        if self._pausing is not None:
            promoted, _, let_go = self._pausing.fill_slot(
                is_last=not has_new, most_trials=len(self._values), max_states=self._most_states
            )
            self._without_state.update(let_go)
            if promoted is not None:
                self._begin(now, promoted.number, self._ends.index(promoted.milestone) + 1)
                return True
        if has_new:
            self._begin(now, self._num_begun, 0)
            self._num_begun += 1
        return has_new

    def _begin(self, now: float, number: int, rung: int) -> None:
        """Train a trial until its next report, from its last one if its state was kept."""
        has_state = rung > 0 and number not in self._without_state
        num_reports = 1 if has_state else rung + 1
        samples = self._ends[rung] - (self._ends[rung - 1] if has_state else 0)
        self._num_retrained += number in self._without_state
        self._without_state.discard(number)
        self._samples += samples
        self._num_reports += num_reports
        done = now + samples + num_reports * self._report_cost
        heapq.heappush(self._under_way, (done, number, rung))
