"""Who runs on which fresh seed, and when it is decided: the race that confirms a search.

The candidates, as many as the budget of runs can judge (`Confirm.num_raced`), and the default
configuration run on the same fresh seeds, one seed (a *round*) after the other. After each round
the worse half of the candidates drops out, by the mean of their seeds and of what the search knows
of them in full: sequential halving (Karnin, Koren & Somekh, ICML 2013),
a rule for a fixed number of runs. More of them do where the runs that are left would not suffice
for two rounds with the best alone for each round that has chosen between several. One whose run
fails drops out too; the default one never does. When one candidate is left, the two go on until the
gain is decided or the runs are used up.

Decided: an interval of the gain, Student's paired t over the seeds that both have, does not hold 0.
After the last run that is the 95 % interval of the verdict, wrong to one side in 2.5 of 100 cases.
That a candidate was chosen by what stands in the interval too flatters it: of equal ones, with a
third of the seeds that chose, the best is wrongly ahead in 4 (of three, the default) to 5.4. The
looks before the last one, from `JUDGED_SEEDS` rounds on, share a further error equally
(Bonferroni): 1 of 100 after a choice, 5 without one, both sides together. So a search without a
better configuration ends with "beats the default one" in at most 6 of 100 cases by its seeds alone,
4 with the default of 8 runs; `tests/search/test_race.py` simulates it, and
`benchmarks/confirm_race.py` with the spread of real trainings.

Pure functions of what has ended, whatever the order: a race that was interrupted goes on exactly
where it was, and several at once run what one after the other would have.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nanovlm.results.comparison import paired_p_value
from nanovlm.search.sections import JUDGED_SEEDS, Confirm

Results = Mapping[tuple[int, int], float | None]
"""The value of each ended run, by the number of its configuration and its round; more is better.
None if it failed."""

Run = tuple[int, int]
"""Number of a configuration, and round."""

_EARLY_ERROR, _EARLY_ERROR_AFTER_CHOICE = 0.05, 0.01
"""Of all looks but the last, both sides together."""


@dataclass(frozen=True)
class Race:
    """What a race is between."""

    candidates: tuple[int, ...]
    """Numbers of the configurations that enter, the best of the search first."""
    default: int | None
    """Number of the default configuration; None if it cannot run."""
    most_runs: int
    searched: Mapping[int, float] = field(default_factory=dict)
    """What candidates reached in the search that ran in full there: for the choice between them as
    good as one more seed. The verdict does not know it, for luck has helped it."""

    @staticmethod
    def between(
        ranked: Sequence[int],
        default: int | None,
        confirm: Confirm,
        searched: Mapping[int, float] | None = None,
    ) -> "Race":
        """Return the race of a search's configurations, the best first."""
        candidates = tuple(ranked[: confirm.num_raced])
        return Race(candidates, default, confirm.most_runs, searched or {})

    def next_runs(self, results: Results) -> tuple[Run, ...]:
        """Return all runs that are certain now and have not ended; none when it is over.

        The first of them follows if one runs at a time. Later results add runs and take none away.
        """
        left, field = self.most_runs, list(self.candidates)
        seed_round = num_choices = 0
        while True:
            runners = self._runners(field)
            if not field or len(runners) > left:
                return ()
            left -= len(runners)
            wanted = [(n, seed_round) for n in runners if (n, seed_round) not in results]
            if wanted:
                return (*wanted, *self._certain_later(field, seed_round + 1, left, results))
            num_choices += len(field) > 1
            seed_round += 1
            field = self._survivors(field, seed_round, left, results)
            if len(field) == 1 and self._is_over(field[0], seed_round, num_choices, left, results):
                return ()

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
        self, field: Sequence[int], rounds: int, left: int, results: Results
    ) -> list[int]:
        """Return who goes on after so many rounds, the best first; of equal ones the earlier."""
        means = dict[int, float]()
        for number in field:
            values = [results[number, r] for r in range(rounds)]
            finished = [value for value in values if value is not None]
            if len(finished) == rounds:
                known = [self.searched[number]] if number in self.searched else []
                means[number] = statistics.fmean([*finished, *known])
        ordered = sorted(means, key=lambda n: (-means[n], self.candidates.index(n)))
        half = math.ceil(len(ordered) / 2)
        if self.default is None:
            return ordered[: max(1, min(half, left))]
        alone = (JUDGED_SEEDS - 1) * (rounds + 1)  # rounds, should the next one choose as well
        return ordered[: max(1, min(half, left - 1 - 2 * alone))]

    def _is_over(
        self, leader: int, rounds: int, num_choices: int, left: int, results: Results
    ) -> bool:
        """Return whether it is decided early between the last candidate and the default one."""
        if self.default is None:
            return True
        first_look, last_look = JUDGED_SEEDS * max(1, num_choices), rounds + left // 2
        if not first_look <= rounds < last_look:
            return False
        gains = [
            ours - other
            for seed_round in range(rounds)
            if (ours := results[leader, seed_round]) is not None
            and (other := results[self.default, seed_round]) is not None
        ]
        error = _EARLY_ERROR_AFTER_CHOICE if num_choices else _EARLY_ERROR
        num_looks = last_look - first_look  # besides the last one, which is that of the verdict
        return len(gains) >= JUDGED_SEEDS and paired_p_value(gains) < error / num_looks


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
