"""Who runs on which fresh seed, and when it is decided: the race that confirms a search.

The candidates, as many as the budget of runs can judge (`Confirm.num_raced`), and the default
configuration run on the same fresh seeds, one seed (a *round*) after the other. After each round
the worse half of the candidates drops out, and more of them where that leaves too few runs to judge
the best: sequential halving (Karnin, Koren & Somekh, ICML 2013), a rule for a fixed number of runs.
One whose run fails drops out too; the default one never does. When one candidate is left, the two
go on until the gain is decided or the runs are used up.

Decided: Welch's interval of the gain over seeds does not hold 0. After the last run that is the
95 % interval of the verdict. The looks before it, from `JUDGED_SEEDS` seeds on, share another 5 %
equally (Bonferroni), so that a search without a better configuration ends with "beats the default"
in at most 5 of 100 cases, a half of it by the last look and a half by the earlier ones. That the
candidate was chosen by its first seeds is part of them: with three seeds or more the choice helps
its mean by at most a third of the spread between seeds, which Welch's caution at few seeds makes up
for. `benchmarks/confirm_race.py` measures the rate.

Pure functions of what has ended, whatever the order: a race that was interrupted goes on exactly
where it was, and several at once run what one after the other would have.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanovlm.results.comparison import welch_p_value
from nanovlm.search.sections import JUDGED_SEEDS, Confirm

Results = Mapping[tuple[int, int], float | None]
"""The value of each ended run, by the number of its configuration and its round; more is better.
None if it failed."""

Run = tuple[int, int]
"""Number of a configuration, and round."""

_EARLY_ERROR = 0.05
"""Of all looks but the last, both sides together."""


@dataclass(frozen=True)
class Race:
    """What a race is between."""

    candidates: tuple[int, ...]
    """Numbers of the configurations that enter, the best of the search first."""
    default: int | None
    """Number of the default configuration; None if it cannot run."""
    most_runs: int

    @staticmethod
    def between(ranked: Sequence[int], default: int | None, confirm: Confirm) -> "Race":
        """Return the race of a search's configurations, the best first."""
        return Race(tuple(ranked[: confirm.num_raced]), default, confirm.most_runs)

    def next_runs(self, results: Results) -> tuple[Run, ...]:
        """Return all runs that are certain now and have not ended; none when it is over.

        The first of them follows if one runs at a time. Later results add runs and take none away.
        """
        left, field = self.most_runs, list(self.candidates)
        seed_round = 0
        while True:
            runners = self._runners(field)
            if not field or len(runners) > left:
                return ()
            left -= len(runners)
            wanted = [(n, seed_round) for n in runners if (n, seed_round) not in results]
            if wanted:
                return (*wanted, *self._certain_later(field, seed_round + 1, left, results))
            field = self._survivors(field, seed_round, left, results)
            if len(field) == 1 and self._is_over(field[0], seed_round + 1, left, results):
                return ()
            seed_round += 1

    def _runners(self, field: Sequence[int]) -> list[int]:
        """Return who runs in a round: whatever the time suffices for is comparable."""
        return [*field[:1], *([] if self.default is None else [self.default]), *field[1:]]

    def _certain_later(
        self, field: Sequence[int], first_round: int, left: int, results: Results
    ) -> Iterator[Run]:
        """Yield what runs before the first look whatever comes of the round under way."""
        if self.default is None:
            return
        sure = self._runners(field) if len(field) == 1 else [self.default]
        for seed_round in range(first_round, min(JUDGED_SEEDS, first_round + left // 2)):
            yield from ((n, seed_round) for n in sure if (n, seed_round) not in results)

    def _survivors(
        self, field: Sequence[int], seed_round: int, left: int, results: Results
    ) -> list[int]:
        """Return who goes on after a round, the best first; of equal ones the earlier."""
        rounds = range(seed_round + 1)
        means = {
            n: math.fsum(results[n, r] or 0.0 for r in rounds)
            for n in field
            if all(results[n, r] is not None for r in rounds)
        }
        ordered = sorted(means, key=lambda n: (-means[n], self.candidates.index(n)))
        beside = 0 if self.default is None else 1
        later_rounds = max(0, JUDGED_SEEDS - seed_round - 2)
        affordable = left - beside - later_rounds * (1 + beside)
        return ordered[: max(1, min(math.ceil(len(ordered) / 2), affordable))]

    def _is_over(self, leader: int, rounds: int, left: int, results: Results) -> bool:
        """Return whether it is decided early between the last candidate and the default one."""
        if self.default is None:
            return True
        if rounds < JUDGED_SEEDS or left < 2:
            return False
        both = common_rounds(results, (leader, self.default), rounds)
        ours, others = ([results[n, r] or 0.0 for r in both] for n in (leader, self.default))
        if len(both) < JUDGED_SEEDS:
            return False
        num_looks = rounds + left // 2 - JUDGED_SEEDS  # the last one is that of the verdict
        return welch_p_value(ours, others) < _EARLY_ERROR / num_looks


def common_rounds(results: Results, numbers: Collection[int], rounds: int) -> list[int]:
    """Return the rounds that all of these configurations have finished."""
    return [
        r for r in range(rounds) if all(results.get((number, r)) is not None for number in numbers)
    ]


def most_batches(race: Race, slots: int) -> tuple[int, int]:
    """Return how many runs there are at most, and how many trainings long they take at once.

    That is a race in which nobody is ahead.
    """
    results = dict[Run, float | None]()
    num_batches = 0
    while wanted := race.next_runs(results):
        num_batches += 1
        results |= dict.fromkeys(wanted[:slots], 0.0)
    return len(results), num_batches
