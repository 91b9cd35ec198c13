"""Which trials stop at a milestone: ASHA, Hyperband and PASHA as pure rules, and their memory.

A rung is the list of the values that trials had at a milestone.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.config.space import SearchSpace
from nanovlm.pruning.decisions import DecisionLog, PruningDecision
from nanovlm.pruning.pausing_halving import PausingHalving
from nanovlm.results.pareto import best_first, describe_values, least_extents, losses

_SOFT_RANKING_PERCENTILE = 90


def build_rungs(
    space: SearchSpace, milestones: Sequence[int], log: Path | None = None
) -> "SuccessiveHalving | PausingHalving":
    """Return the rungs of a space's scheduler.

    Args:
        log: keeps what is decided; the rungs are as its last line left them. None keeps nothing.
    """
    objective, seed = space.objective, space.sampler.seed
    if space.scheduler.pauses:
        return PausingHalving(space.scheduler, milestones, objective=objective, log=log)
    return SuccessiveHalving(space.scheduler, milestones, objective=objective, seed=seed, log=log)


class SuccessiveHalving:
    """Judges the reports of a search's trials, which end where they do not go on.

    asha (Li et al. 2020, in the form that only stops): a trial goes on if its value is no worse
    than the (1 - 1/factor) quantile of those that came to the milestone before it; the first goes
    on. Ray Tune's rule, but that a milestone's rung takes only reports that were made at it.

    hyperband (Li et al. 2018): asha in several brackets, of which each leaves out one more of the
    first milestones, so that slow starters get their chance. A trial's bracket is drawn by its
    number, as often as Hyperband gives it trials.

    pasha (Bohdal et al. 2023): asha with a limit to the milestones. It is raised when the trials of
    the two highest rungs are not in the same order, where values count as equal that differ by no
    more than those of trials whose order changes on the way; a trial that reaches it ends there.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        milestones: Sequence[int],
        *,
        objective: Objective,
        seed: int = 0,
        log: Path | None = None,
    ) -> None:
        """Make the rungs; with a log, as they were when the last decision was written to it."""
        self._scheduler = scheduler
        self._milestones = tuple(milestones)
        self.objective = objective
        self._metric, self._mode = objective.metric, objective.mode
        self._sign = 1.0 if objective.mode == "max" else -1.0
        self._seed = seed
        self._log = DecisionLog(log)
        self._rungs: dict[tuple[int, int], list[tuple[float, ...]]] = {}
        """Sorted, by bracket and milestone: the losses of each trial times -1."""
        self._decisions: dict[tuple[int, int], PruningDecision] = {}  # by number and milestone
        self._stops: dict[int, str] = {}  # reasons, by number
        self._limit = 2 if scheduler.name == "pasha" else 0  # milestones that pasha allows
        for line in self._log.read():
            if isinstance(line, PruningDecision):
                self._add(line)
                self._decide(line)
            else:
                self._remove(line.withdrawn)

    def decide(
        self, number: int, samples_seen: int, value: float, *others: float
    ) -> PruningDecision:
        """Return whether a trial goes on after a report that is not its last.

        Args:
            others: the values of the other objectives, if there are several.
        """
        milestone = max(m for m in self._milestones if m <= samples_seen)
        known = self._decisions.get((number, milestone))
        if known is not None:
            return known
        reason = "compared with nothing here"
        decision = self._compare(
            PruningDecision(number, milestone, samples_seen, value, True, reason, others=others)
        )
        self._add(decision)
        if decision.goes_on and self._is_at_limit(milestone):
            decision = self._within_limit(decision)
        self._log.add(decision)
        self._decide(decision)
        return decision

    def withdraw(self, number: int) -> None:
        """Take the values of a failed trial out of the rungs."""
        if any(key[0] == number for key in self._decisions):
            self._remove(number)
            self._log.withdraw(number)

    def reason(self, number: int) -> str | None:
        """Return why a trial was stopped, None if it was not."""
        return self._stops.get(number)

    def bracket(self, number: int) -> int:
        """Return how many of the first milestones a trial passes without a comparison."""
        if self._scheduler.name != "hyperband":
            return 0
        num_rungs = np.arange(len(self._milestones), -1, -1)  # of each bracket
        trials = float(self._scheduler.reduction_factor) ** num_rungs / (num_rungs + 1)
        random = np.random.default_rng([self._seed, number])
        return int(random.choice(len(num_rungs), p=trials / trials.sum()))

    # ------------------------------------------------------------------ the rules

    def _rung(self, number: int, milestone: int) -> list[tuple[float, ...]] | None:
        bracket = self.bracket(number)
        if self._milestones.index(milestone) < bracket:
            return None
        return self._rungs.setdefault((bracket, milestone), [])

    def _compare(self, report: PruningDecision) -> PruningDecision:
        """Return the decision of asha on a report."""
        rung = self._rung(report.number, report.milestone)
        if not rung:
            return report
        if len(self.objective.all) > 1:
            return self._compare_several(report, rung)
        values = [value for (value,) in rung]
        cutoff = self._sign * _quantile(values, 1 - 1 / self._scheduler.reduction_factor)
        goes_on = self._sign * report.value >= self._sign * cutoff
        side = "below" if self._mode == "max" else "above"
        reason = (
            f"{self._metric} {report.value:.4g} {'reaches' if goes_on else side} {cutoff:.4g}, the "
            f"cutoff of {len(rung)} trials at {report.milestone} samples"
        )
        return dataclasses.replace(
            report, goes_on=goes_on, reason=reason, cutoff=cutoff, rung_size=len(rung)
        )

    def _compare_several(
        self, report: PruningDecision, rung: Sequence[tuple[float, ...]]
    ) -> PruningDecision:
        """Return the decision of asha with several objectives: a trial goes on if no more are
        better than a value at the quantile has before it."""
        places = 1 + (len(rung) - 1) // self._scheduler.reduction_factor
        rows = -np.array([self._entry(report), *rung])
        place = best_first(rows, least_extents(self.objective)).index(0)
        reason = (
            f"{describe_values(self.objective, report.values)} is number {place + 1} of "
            f"{len(rows)} trials at {report.milestone} samples, of which the best {places} go on"
        )
        return dataclasses.replace(
            report, goes_on=place < places, reason=reason, rung_size=len(rung)
        )

    def _entry(self, decision: PruningDecision) -> tuple[float, ...]:
        return tuple(-loss for loss in losses(self.objective, [decision.values])[0].tolist())

    def _is_at_limit(self, milestone: int) -> bool:
        return self._milestones.index(milestone) + 1 == self._limit

    def _within_limit(self, decision: PruningDecision) -> PruningDecision:
        """Return the decision of pasha on a trial at the limit that asha lets go on."""
        if not self._has_stable_order():
            return decision
        reason = (
            f"trials are in the same order at {decision.milestone} samples as at the milestone "
            "before, so none trains longer"
        )
        return dataclasses.replace(decision, goes_on=False, reason=reason)

    def _has_stable_order(self) -> bool:
        """Return whether the two highest rungs within the limit order their trials alike."""
        below, top = self._limit - 2, self._limit - 1
        pairs = [
            [one - other for one, other in zip(*curves, strict=True)]
            for curves in itertools.combinations(self._curves(top), 2)
        ]
        twice = [abs(gaps[top]) for gaps in pairs if _num_crossings(gaps) > 1]
        equal = float(np.percentile(twice, _SOFT_RANKING_PERCENTILE)) if twice else 0.0
        return not any(gaps[below] * gaps[top] < 0 and abs(gaps[top]) > equal for gaps in pairs)

    def _curves(self, top: int) -> list[list[float]]:
        """Return the values of the trials that came to milestone number `top`, at each up to it."""
        numbers = [n for n, milestone in self._decisions if milestone == self._milestones[top]]
        return [
            [self._decisions[number, milestone].value for milestone in self._milestones[: top + 1]]
            for number in numbers
        ]

    # ------------------------------------------------------------------ the memory

    def _add(self, decision: PruningDecision) -> None:
        self._decisions[decision.number, decision.milestone] = decision
        rung = self._rung(decision.number, decision.milestone)
        if rung is not None:
            bisect.insort(rung, self._entry(decision))

    def _decide(self, decision: PruningDecision) -> None:
        """Remember what is acted upon."""
        self._decisions[decision.number, decision.milestone] = decision
        if not decision.goes_on:
            self._stops[decision.number] = decision.reason
        elif self._is_at_limit(decision.milestone):
            self._limit += 1

    def _remove(self, number: int) -> None:
        for key in [key for key in self._decisions if key[0] == number]:
            decision = self._decisions.pop(key)
            rung = self._rung(number, decision.milestone)
            if rung is not None:
                rung.remove(self._entry(decision))


def _num_crossings(gaps: Sequence[float]) -> int:
    """Return how often the sign changes."""
    signs = [gap > 0 for gap in gaps if gap != 0]
    return sum(sign != before for sign, before in itertools.pairwise(signs))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of sorted values, interpolated linearly as numpy does."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
