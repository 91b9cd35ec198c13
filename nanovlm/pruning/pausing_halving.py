"""Which paused trial goes on: ASHA with promotions, as a pure rule with a memory.

A trial waits at each milestone until it is among the best third there (at `reduction_factor: 3`).
Nothing is spent on a trial before others were compared with it, and a trial that came too early to
be compared is not lost.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective, Scheduler
from nanovlm.pruning.decisions import DecisionLog, PruningDecision
from nanovlm.results.pareto import describe_values
from nanovlm.results.ranking import make_ranking, rank_correlation

_MARGIN = 2
"""A paused trial is given up when it is beyond so many times the places from which trials go on:
trials that went on early and fell back later take no places away."""

_ENOUGH_PAIRS = 12
"""Trials with values at a milestone and at the next one, before these can say that the first one
tells nothing. Of two that are correlated by 0.6 among all trials, some 0.35 is left among the best
third, and 12 of those show less than none in one search of eight."""


class PausingHalving:
    """Judges the reports of a search's trials, and says which of those that wait goes on.

    The rule (Li et al. 2020, algorithm 2): of the n trials that have come to a milestone the best
    floor(n / factor) may go on; the highest milestone comes first, and there the best trial. Of
    equal values the earlier trial is the better one. With several objectives trials are ordered as
    `results/pareto.py: order` says; what a milestone says of the next is judged by the first.

    A milestone does not decide while its values say nothing of those at the next one: while their
    rank correlation over the trials that have both is not positive. Trials pass it then, and those
    that wait there wait on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        milestones: Sequence[int],
        *,
        objective: Objective,
        log: Path | None = None,
    ) -> None:
        """Make the rungs; with a log, as they were when the last decision was written to it."""
        self._factor = scheduler.reduction_factor
        self._milestones = tuple(milestones)
        self.objective = objective
        self._metric = objective.metric
        self._rungs = {milestone: make_ranking(objective) for milestone in milestones}
        self._correlations: dict[int, float | None] = {}  # those that still hold, by milestone
        self._decisions: dict[tuple[int, int], PruningDecision] = {}  # by number and milestone
        self._paused: dict[int, PruningDecision] = {}
        self._log = DecisionLog(log)
        for line in self._log.read():
            if isinstance(line, PruningDecision):
                self._take(line)
            else:
                self._remove(line.withdrawn)

    @property
    def paused(self) -> Mapping[int, PruningDecision]:
        """The trials that wait, by number."""
        return self._paused

    def decide(
        self, number: int, samples_seen: int, value: float, *others: float
    ) -> PruningDecision:
        """Return whether a trial goes on after a report that is not its last.

        It does if it is the one that a free slot would take; else it waits.

        Args:
            others: the values of the other objectives, if there are several.
        """
        milestone = max(m for m in self._milestones if m <= samples_seen)
        known = self._decisions.get((number, milestone))
        if known is not None:
            return known
        waits = PruningDecision(
            number, milestone, samples_seen, value,
            goes_on=False, reason="", is_paused=True, others=others,
        )  # fmt: skip
        self._take(waits)
        if not self._decides(milestone):
            return self._pass(waits)
        if self._promotable() == number:
            return self._decide(waits, goes_on=True)
        return self._decide(waits, is_paused=True)

    def promote(
        self, is_last: bool = False, arrived: Container[int] | None = None
    ) -> PruningDecision | None:
        """Return the decision on the trial that a free slot goes on with, None if all have to wait.

        Args:
            is_last: no trial begins any more. The places from which trials go on are rounded up
                then, so that a search of few trials has one of full length.
            arrived: the trials that have given their slots back; None means all that pause.
        """
        number = self._promotable(is_last)
        if number is None or (arrived is not None and number not in arrived):
            return None
        return self._decide(self._paused[number], goes_on=True)

    def rank_correlation(self, milestone: int) -> float | None:
        """Return how much a milestone's values say of those at the next one, from -1 to 1
        (Spearman); None while too few trials have both, and at the last milestone."""
        if milestone == self._milestones[-1]:
            return None
        if milestone not in self._correlations:
            later = self._milestones[self._milestones.index(milestone) + 1]
            self._correlations[milestone] = self._correlation(milestone, later)
        return self._correlations[milestone]

    def _correlation(self, milestone: int, later: int) -> float | None:
        pairs = [
            (self._decisions[number, milestone].value, self._decisions[number, later].value)
            for number in self._rungs[later].numbers()
            if (number, milestone) in self._decisions
        ]
        if len(pairs) < _ENOUGH_PAIRS:
            return None
        ours, theirs = zip(*pairs, strict=True)
        return rank_correlation(ours, theirs)

    def silent_milestones(self) -> dict[int, float]:
        """Return the milestones that do not decide, with their rank correlations."""
        correlations = {m: self.rank_correlation(m) for m in self._milestones}
        return {m: r for m, r in correlations.items() if r is not None and r <= 0}

    def end_hopeless(
        self, most_trials: int, arrived: Container[int] | None = None
    ) -> list[PruningDecision]:
        """End the paused trials that will not be among the best of so many trials.

        Args:
            arrived: as in `promote`; another one is ended when it is asked for again.
        """
        ended = list[PruningDecision]()
        reach = most_trials
        for milestone, rung in self._rungs.items():
            num_all = max(reach, len(rung))
            reach = math.ceil(num_all / self._factor)
            if len(rung) > _MARGIN * reach:
                ended += [
                    self._decide(self._paused[number], num_all=num_all)
                    for number in rung.numbers(_MARGIN * reach)
                    if self._waits_at(number, milestone)
                    if arrived is None or number in arrived
                ]
        return ended

    def end_all(self) -> list[PruningDecision]:
        """End the paused trials: nothing runs any more with which they could be compared."""
        return [
            self._decide(decision, rounded=math.ceil) for decision in list(self._paused.values())
        ]

    def least_promising(self, num_kept: int | None) -> list[int]:
        """Return the paused trials but for the `num_kept` that are nearest to going on."""

        def distance(decision: PruningDecision) -> tuple[float, int]:
            rung = self._rungs[decision.milestone]
            return rung.place(decision.number) / len(rung), decision.number

        if num_kept is None or len(self._paused) <= num_kept:
            return []
        ordered = sorted(self._paused.values(), key=distance)
        return [decision.number for decision in ordered[num_kept:]]

    def keep_waiting(self, waiting: Container[int], ended: Container[int]) -> None:
        """Let only these trials wait, when a search goes on that was cut off.

        A trial that the end of the search has ended waits no more. Any other one whose pause was
        cut off before it was acted upon makes its last report again, and is judged again.
        """
        for number in [number for number in self._paused if number not in waiting]:
            decision = self._paused.pop(number)
            if number not in ended:
                del self._decisions[number, decision.milestone]
                self._leave_rung(decision)

    def withdraw(self, number: int) -> None:
        """Take the values of a failed trial out of the rungs."""
        if any(key[0] == number for key in self._decisions):
            self._remove(number)
            self._log.withdraw(number)

    # ------------------------------------------------------------------ inside

    def _promotable(self, is_last: bool = False) -> int | None:
        rounded = math.ceil if is_last else math.floor
        for milestone in reversed(self._milestones):
            if not (is_last or self._decides(milestone)):
                continue
            rung = self._rungs[milestone]
            best = rung.numbers(0, rounded(len(rung) / self._factor))
            waiting = (number for number in best if self._waits_at(number, milestone))
            if (number := next(waiting, None)) is not None:
                return number
        return None

    def _waits_at(self, number: int, milestone: int) -> bool:
        return number in self._paused and self._paused[number].milestone == milestone

    def _decides(self, milestone: int) -> bool:
        return milestone not in self.silent_milestones()

    def _pass(self, decision: PruningDecision) -> PruningDecision:
        """Let a trial go on past a milestone that does not decide."""
        later = self._milestones[self._milestones.index(decision.milestone) + 1]
        correlation = self.rank_correlation(decision.milestone)
        return self._act_on(
            decision,
            goes_on=True,
            is_paused=False,
            reason=f"{self._metric} at {decision.milestone} samples says nothing of that at "
            f"{later}: rank correlation {correlation:.2f}",
        )

    def _decide(
        self,
        decision: PruningDecision,
        *,
        goes_on: bool = False,
        is_paused: bool = False,
        num_all: int | None = None,
        rounded: Callable[[float], int] = math.floor,
    ) -> PruningDecision:
        """Write down what becomes of a trial that waits, and return it."""
        rung = self._rungs[decision.milestone]
        place = 1 + rung.place(decision.number)
        size = len(rung) if num_all is None else num_all
        best = max(1, rounded(size / self._factor))
        shown = describe_values(self.objective, decision.values)
        rank = f"{shown} is number {place} of {len(rung)} trials at {decision.milestone} samples"
        if num_all is not None:
            reason = f"{rank}, too far behind the best {best} of {num_all}"
        elif goes_on:
            reason = rank
        else:
            reason = f"{rank}, of which the best {best} go on"
        return self._act_on(
            decision,
            goes_on=goes_on,
            is_paused=is_paused,
            reason=reason,
            cutoff=self._cutoff(decision.milestone, best - 1),
        )

    def _cutoff(self, milestone: int, place: int) -> float | None:
        """Return the value at a place of a rung; with several objectives there is no one number."""
        if len(self.objective.all) > 1:
            return None
        (number,) = self._rungs[milestone].numbers(place, place + 1)
        return self._decisions[number, milestone].value

    def _act_on(self, decision: PruningDecision, **decided: Any) -> PruningDecision:
        """Write down a trial's decision with what was decided, then remember it."""
        size = len(self._rungs[decision.milestone]) - 1
        acted_on = replace(decision, rung_size=size, **decided)
        self._log.add(acted_on)
        self._take(acted_on)
        return acted_on

    def _take(self, decision: PruningDecision) -> None:
        """Remember a decision; the first one at a milestone puts the trial into the rung."""
        place = decision.number, decision.milestone
        if place not in self._decisions:
            self._rungs[decision.milestone].add(decision.number, decision.values)
            before = self._milestones.index(decision.milestone) - 1
            self._correlations.pop(self._milestones[before], None)
        self._decisions[place] = decision
        self._paused.pop(decision.number, None)
        if decision.is_paused:
            self._paused[decision.number] = decision

    def _leave_rung(self, decision: PruningDecision) -> None:
        self._rungs[decision.milestone].remove(decision.number)
        self._correlations.clear()

    def _remove(self, number: int) -> None:
        for key in [key for key in self._decisions if key[0] == number]:
            self._leave_rung(self._decisions.pop(key))
        self._paused.pop(number, None)
