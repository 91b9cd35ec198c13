"""Which paused trial goes on: ASHA with promotions, as a pure rule with a memory.

A trial waits at each milestone until it is among the best third there (at `reduction_factor: 3`).
Nothing is spent on a trial before others were compared with it, and a trial that came too early to
be compared is not lost.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nanovlm.config.space import SearchSpace
from nanovlm.pruning.successive_halving import StoppingHalving, SuccessiveHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.pareto import Ranking, describe_values
from nanovlm.results.statistics import RankCorrelation

_MARGIN = 2
"""A paused trial is given up when its rank is beyond so many times the number that go on: trials
that went on early and fell back later do not count against it."""

_ENOUGH_PAIRS = 12
"""Trials with values at a milestone and at the next one, before these can say that the first one
tells nothing. Of two that are correlated by 0.6 among all trials, some 0.35 is left among the best
third, and 12 of those show less than none in one search of eight."""


def build_rungs(
    space: SearchSpace, milestones: Sequence[int], log: Path | None = None
) -> SuccessiveHalving:
    """Return the rule of a space's scheduler.

    Args:
        log: keeps what is decided; the rungs are as its last line left them. None keeps nothing.
    """
    rule = PausingHalving if space.scheduler.pauses else StoppingHalving
    return rule(
        space.scheduler, milestones, objective=space.objective, seed=space.sampler.seed, log=log
    )


class PausingHalving(SuccessiveHalving):
    """Says which of the trials that wait goes on.

    The rule (Li et al. 2020, algorithm 2): of the n trials that have come to a milestone the best
    floor(n / factor) may go on; the highest milestone comes first, and there the best trial. Of
    equal values the earlier trial is the better one. With several objectives trials are ordered as
    `results/pareto.py: order` says; what a milestone says of the next is judged by the first.

    A milestone does not decide while its values say nothing of those at the next one: while their
    rank correlation over the trials that have both is not positive. Trials pass it then, and those
    that wait there wait on.
    """

    @property
    def paused(self) -> Mapping[int, PruningDecision]:
        """The trials that wait, by number."""
        return self._paused

    def fill_slot(
        self,
        *,
        is_last: bool,
        most_trials: int | None,
        max_states: int | None,
        arrived: Container[int] | None = None,
    ) -> tuple[PruningDecision | None, list[PruningDecision], list[int]]:
        """Return what follows for the paused trials when a slot is free: which of them goes on, who
        ends, and the numbers of those whose states are not kept.

        Args:
            is_last, arrived: as in `promote`.
            most_trials: that begin; None if that is not known, then none ends.
            max_states: see `least_promising`.
        """
        promoted = self.promote(is_last, arrived)
        ended = [] if most_trials is None else self.end_hopeless(most_trials, arrived)
        return promoted, ended, self.least_promising(max_states)

    def promote(
        self, is_last: bool = False, arrived: Container[int] | None = None
    ) -> PruningDecision | None:
        """Return the decision on the trial that a free slot goes on with, None if all have to wait.

        Args:
            is_last: no trial begins any more. How many go on is rounded up then, so that a search
                of few trials has one of full length.
            arrived: the trials that have given their slots back; None means all that pause.
        """
        number = self._promotable(is_last)
        if number is None or (arrived is not None and number not in arrived):
            return None
        return self._decide(self._paused[number], goes_on=True)

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
                    for number in rung.among(self._waiting[milestone], _MARGIN * reach)
                    if arrived is None or number in arrived
                ]
        return ended

    def end_all(self) -> list[PruningDecision]:
        """End the paused trials: nothing runs any more with which they could be compared."""
        return [self._decide(waits, rounded=math.ceil) for waits in list(self._paused.values())]

    def least_promising(self, num_kept: int | None) -> list[int]:
        """Return the paused trials but for the `num_kept` that are nearest to going on."""
        if num_kept is None or len(self._paused) <= num_kept:
            return []
        distances = [
            (index / len(rung), number)
            for milestone, rung in self._rungs.items()
            for index, number in enumerate(rung.numbers())
            if number in self._waiting[milestone]
        ]
        return [number for _, number in sorted(distances)[num_kept:]]

    def keep_waiting(self, waiting: Container[int], ended: Container[int]) -> None:
        """Let only these trials wait, when a search goes on that was cut off.

        A trial that the end of the search has ended waits no more. Any other one whose pause was
        cut off before it was acted upon makes its last report again, which is decided again.
        """
        for number in [number for number in self._paused if number not in waiting]:
            decision = self._paused[number]
            self._end_wait(number)
            if number not in ended:
                self._leave(self._decisions.pop((number, decision.milestone)))

    def rank_correlation(self, milestone: int) -> float | None:
        """Return how much a milestone's values say of those at the next one, from -1 to 1
        (Spearman); None while too few trials have both, and at the last milestone."""
        found = self._correlations.get(milestone)
        return found.value() if found and found.num_pairs >= _ENOUGH_PAIRS else None

    def silent_milestones(self) -> dict[int, float]:
        """Return the milestones that do not decide, with their rank correlations."""
        correlations = {m: self.rank_correlation(m) for m in self._milestones}
        return {m: r for m, r in correlations.items() if r is not None and r <= 0}

    # ------------------------------------------------------------------ inside

    def _make_rungs(self) -> None:
        self._rungs = {milestone: Ranking(self.objective) for milestone in self._milestones}
        self._correlations = {milestone: RankCorrelation() for milestone in self._milestones[:-1]}
        self._paused: dict[int, PruningDecision] = {}
        self._waiting = {milestone: Ranking(self.objective) for milestone in self._milestones}
        """The paused trials, by the milestone at which each waits."""

    def _compare(self, report: PruningDecision) -> PruningDecision:
        """Let a trial go on if it is the one that a free slot would take; else it waits."""
        waits = replace(report, goes_on=False, is_paused=True)
        self._take(waits)
        milestone = report.milestone
        if milestone not in self.silent_milestones():
            goes_on = self._promotable() == report.number
            return self._decide(waits, goes_on=goes_on, is_paused=not goes_on)
        later = self._milestones[self._milestones.index(milestone) + 1]
        reason = (
            f"{self.objective.metric} at {milestone} samples says nothing of that at {later}: rank "
            f"correlation {self.rank_correlation(milestone):.2f}"
        )
        size = len(self._rungs[milestone]) - 1
        return self._act_on(replace(report, reason=reason, rung_size=size))

    def _promotable(self, is_last: bool = False) -> int | None:
        """Return the trial that goes on next, if one may."""
        rounded = math.ceil if is_last else math.floor
        for milestone, rung in reversed(self._rungs.items()):
            if is_last or milestone not in self.silent_milestones():
                may_go_on = rounded(len(rung) / self._factor)
                for number in rung.among(self._waiting[milestone], 0, may_go_on):
                    return number
        return None

    def _decide(
        self,
        decision: PruningDecision,
        *,
        goes_on: bool = False,
        is_paused: bool = False,
        num_all: int | None = None,
        rounded: Callable[[float], int] = math.floor,
    ) -> PruningDecision:
        """Act on the decision on a trial that waits, and return it with its reason."""
        rung, milestone = self._rungs[decision.milestone], decision.milestone
        index, size = rung.index(decision.number), len(rung) if num_all is None else num_all
        num_best = max(1, rounded(size / self._factor))
        shown = describe_values(self.objective, decision.values)
        reason = f"{shown} is number {index + 1} of {len(rung)} trials at {milestone} samples"
        if num_all is not None:
            reason += f", too far behind the best {num_best} of {num_all}"
        elif not goes_on:
            reason += f", of which the best {num_best} go on"
        (last,) = rung.numbers(num_best - 1, num_best)
        is_single = len(self.objective.all) == 1  # of several there is no one number
        return self._act_on(
            replace(
                decision,
                goes_on=goes_on,
                is_paused=is_paused,
                reason=reason,
                cutoff=self._decisions[last, milestone].value if is_single else None,
                rung_size=len(rung) - 1,
            )
        )

    def _take(self, decision: PruningDecision) -> None:
        super()._take(decision)
        self._end_wait(decision.number)
        if decision.is_paused:
            self._paused[decision.number] = decision
            self._waiting[decision.milestone].add(decision.number, decision.values)

    def _end_wait(self, number: int) -> None:
        decision = self._paused.pop(number, None)
        if decision is not None:
            self._waiting[decision.milestone].remove(number)

    def _enter(self, decision: PruningDecision) -> None:
        self._rungs[decision.milestone].add(decision.number, decision.values)
        self._correlate(decision)

    def _leave(self, decision: PruningDecision) -> None:
        self._rungs[decision.milestone].remove(decision.number)
        self._end_wait(decision.number)
        self._correlations = {milestone: RankCorrelation() for milestone in self._correlations}
        for other in self._decisions.values():
            self._correlate(other)

    def _correlate(self, decision: PruningDecision) -> None:
        """Pair a trial's value at a milestone with that at the one before, if there is one."""
        index = self._milestones.index(decision.milestone)
        before = self._milestones[index - 1] if index else None
        if before is not None and (earlier := self._decisions.get((decision.number, before))):
            self._correlations[before].add(earlier.value, decision.value)
