"""Which trials stop at a milestone: ASHA, Hyperband and PASHA as pure rules, and their memory.

A rung holds the values that trials had at a milestone.
"""

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.files import append, drop_cut_line
from nanovlm.results.decisions import (
    LINE,
    PruningDecision,
    Withdrawal,
    decision_line,
    last_milestone,
)
from nanovlm.results.pareto import describe_values, order

_SOFT_RANKING_PERCENTILE = 90


class SuccessiveHalving(ABC):
    """Decides on the reports of a search's trials.

    Each decision is written to the log when it is made, so after a kill the rungs are as they were,
    and a report that is made again gets the decision that it got. Whoever acts on a decision syncs
    the log first.
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
        """
        Args:
            milestones: samples seen at which trials are compared, ascending.
            seed: of the brackets of `hyperband`.
            log: `rungs.jsonl`; the rungs are as its last line left them. None keeps nothing.
        """
        self.objective = objective
        self._name, self._factor, self._seed = scheduler.name, scheduler.reduction_factor, seed
        self._milestones = tuple(milestones)
        self._decisions: dict[tuple[int, int], PruningDecision] = {}  # by number and milestone
        self._log = log
        self._make_rungs()
        self._restore()

    def decide(
        self, number: int, samples_seen: int, value: float, *others: float
    ) -> PruningDecision:
        """Return whether a trial goes on after a report that is not its last.

        Args:
            others: the values of the other objectives, if there are several.
        """
        milestone = last_milestone(self._milestones, samples_seen)
        assert milestone is not None, f"a report at {samples_seen} samples is at no milestone"
        known = self._decisions.get((number, milestone))
        reason = "compared with nothing here"
        return known or self._compare(
            PruningDecision(number, milestone, samples_seen, value, True, reason, others=others)
        )

    def withdraw(self, number: int) -> None:
        """Take the values of a failed trial out of the rungs."""
        if any(key[0] == number for key in self._decisions):
            self._remove(number)
            self._write(Withdrawal(number))

    # ------------------------------------------------------------------ the rule

    @abstractmethod
    def _make_rungs(self) -> None:
        """Make empty rungs."""

    @abstractmethod
    def _compare(self, report: PruningDecision) -> PruningDecision:
        """Return the decision on a report, which has been acted upon."""

    @abstractmethod
    def _enter(self, decision: PruningDecision) -> None:
        """Put a trial into its rung."""

    @abstractmethod
    def _leave(self, decision: PruningDecision) -> None:
        """Take it out again."""

    # ------------------------------------------------------------------ the memory

    def _act_on(self, decision: PruningDecision) -> PruningDecision:
        """Write a decision to the log, then remember it."""
        self._write(decision)
        self._take(decision)
        return decision

    def _take(self, decision: PruningDecision) -> None:
        """Remember a decision; the first one at a milestone puts the trial into the rung."""
        key = decision.number, decision.milestone
        if key not in self._decisions:
            self._enter(decision)
        self._decisions[key] = decision

    def _remove(self, number: int) -> None:
        for key in [key for key in self._decisions if key[0] == number]:
            self._leave(self._decisions.pop(key))

    def _write(self, line: PruningDecision | Withdrawal) -> None:
        if self._log is not None:
            append(self._log, decision_line(line), is_synced=isinstance(line, Withdrawal))

    def _restore(self) -> None:
        """Remember the lines of the log; a last one that was cut was not acted upon."""
        if self._log is None or not self._log.exists():
            return
        drop_cut_line(self._log)
        for line in map(LINE.validate_json, self._log.read_text(encoding="utf-8").splitlines()):
            if isinstance(line, PruningDecision):
                self._take(line)
            else:
                self._remove(line.withdrawn)


class StoppingHalving(SuccessiveHalving):
    """Trials go on at once, or end.

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

    def bracket(self, number: int) -> int:
        """Return how many of the first milestones a trial passes without a comparison."""
        if self._name != "hyperband":
            return 0
        num_rungs = np.arange(len(self._milestones), -1, -1)  # of each bracket
        trials = float(self._factor) ** num_rungs / (num_rungs + 1)
        random = np.random.default_rng([self._seed, number])
        return int(random.choice(len(num_rungs), p=trials / trials.sum()))

    def _make_rungs(self) -> None:
        self._rungs = defaultdict[tuple[int, int], dict[int, tuple[float, ...]]](dict)
        """Values by number, by bracket and milestone."""
        self._limit = 2  # milestones that pasha allows

    def _compare(self, report: PruningDecision) -> PruningDecision:
        rung, index = self._rung(report), self._milestones.index(report.milestone)
        if rung and index >= self.bracket(report.number):
            compare = self._by_quantile if len(self.objective.all) == 1 else self._by_order
            report = compare(report, rung)
        if report.goes_on and self._is_at_limit(report) and self._has_stable_order(report):
            reason = (
                f"trials are in the same order at {report.milestone} samples as at the milestone "
                "before, so none trains longer"
            )
            report = replace(report, goes_on=False, reason=reason)
        return self._act_on(report)

    def _by_quantile(
        self, report: PruningDecision, rung: dict[int, tuple[float, ...]]
    ) -> PruningDecision:
        sign, metric = (1 if self.objective.mode == "max" else -1), self.objective.metric
        values = [sign * value for (value,) in rung.values()]
        cutoff = sign * float(np.quantile(values, 1 - 1 / self._factor))
        goes_on = sign * report.value >= sign * cutoff
        side = "reaches" if goes_on else "below" if sign > 0 else "above"
        reason = (
            f"{metric} {report.value:.4g} {side} {cutoff:.4g}, the cutoff of {len(rung)} trials at "
            f"{report.milestone} samples"
        )
        return replace(report, goes_on=goes_on, reason=reason, cutoff=cutoff, rung_size=len(rung))

    def _by_order(
        self, report: PruningDecision, rung: dict[int, tuple[float, ...]]
    ) -> PruningDecision:
        """Decide with several objectives: a trial goes on if no more are better than a value at the
        quantile has before it."""
        num_best = 1 + (len(rung) - 1) // self._factor
        index = order(self.objective, [report.values, *rung.values()]).index(0)
        reason = (
            f"{describe_values(self.objective, report.values)} is number {index + 1} of "
            f"{len(rung) + 1} trials at {report.milestone} samples, of which the best {num_best} "
            "go on"
        )
        return replace(report, goes_on=index < num_best, reason=reason, rung_size=len(rung))

    def _is_at_limit(self, decision: PruningDecision) -> bool:
        index = self._milestones.index(decision.milestone)
        return self._name == "pasha" and index + 1 == self._limit

    def _has_stable_order(self, report: PruningDecision) -> bool:
        """Return whether a milestone and the one before order the trials alike."""
        reached = self._milestones[: self._milestones.index(report.milestone) + 1]
        decisions = {**self._decisions, (report.number, report.milestone): report}
        numbers = [number for number, milestone in decisions if milestone == report.milestone]
        curves = np.array([[decisions[n, m].value for m in reached] for n in numbers])
        first, second = np.triu_indices(len(curves), 1)
        gaps = curves[first] - curves[second]  # float[pairs, milestones]
        last = np.abs(gaps[:, -1])
        twice = last[[_num_crossings(pair) > 1 for pair in gaps]]
        equal = np.percentile(twice, _SOFT_RANKING_PERCENTILE) if len(twice) else 0.0
        return not ((gaps[:, -2] * gaps[:, -1] < 0) & (last > equal)).any()

    def _rung(self, decision: PruningDecision) -> dict[int, tuple[float, ...]]:
        return self._rungs[self.bracket(decision.number), decision.milestone]

    def _take(self, decision: PruningDecision) -> None:
        super()._take(decision)
        if decision.goes_on and self._is_at_limit(decision):
            self._limit += 1

    def _enter(self, decision: PruningDecision) -> None:
        self._rung(decision)[decision.number] = decision.values

    def _leave(self, decision: PruningDecision) -> None:
        del self._rung(decision)[decision.number]


def _num_crossings(gaps: NDArray[np.float64]) -> int:
    """Return how often the sign changes; 0 has none."""
    signs = np.sign(gaps[gaps != 0])
    return sum(one != other for one, other in itertools.pairwise(signs))
