"""How good the race is that confirms a search, against a fixed number of seeds for each.

    python benchmarks/confirm_race.py                # 2,000 searches of each kind, some 10 minutes
    python benchmarks/confirm_race.py --searches 200

Simulated are 16 trials of a search on the digits, what they reached, and the runs that confirm. The
configurations are drawn from the recorded ones (`record_curves.py`); how far seeds lie apart, what
the configurations have in common of that, and how far answers to single questions agree is taken
from configurations that were trained on several seeds (`record_seeds.py`). All rules see the same
searches and the same runs.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.record_curves import CURVES
from benchmarks.record_seeds import DEFAULT, SEEDS
from nanovlm.config.search_settings import Confirm, Objective
from nanovlm.results.conclusion import gain_counts
from nanovlm.results.statistics import mcnemar_exact, paired_interval, pooled_spread
from nanovlm.search.confirm import Race

NUM_TRIALS = 16
OBJECTIVE = Objective()
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


@dataclass(frozen=True)
class Noise:
    """What the recorded runs say of chance."""

    num_questions: int
    default: float
    """Mean accuracy of the default configuration."""
    deviation: float
    """Of a run between seeds, of the logit of its accuracy."""
    common: float
    """Share of its variance that all configurations have in common on a seed."""
    same: float
    """Correlation of a question's latent answer in two runs of one configuration."""
    other: float
    """And of two configurations."""


@cache
def recorded_noise() -> Noise:
    """Return what is recorded of runs that differ in their seed alone."""
    lines = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    names = sorted({line["configuration"] for line in lines})
    seeds = sorted(
        seed for seed in {line["seed"] for line in lines}
        if sum(line["seed"] == seed for line in lines) == len(names)
    )  # fmt: skip
    runs = {(line["configuration"], line["seed"]): line["answers"] for line in lines}
    answers = np.array([[[*map(int, runs[n, s])] for s in seeds] for n in names])
    logits = special.logit(answers.mean(axis=2))
    own = logits - logits.mean(axis=1, keepdims=True)
    common = own.mean(axis=0)
    variance = (own**2).sum() / (own.size - len(names))
    # A mean of several configurations has a part of what is their own, too.
    rest = ((own - common) ** 2).sum() / ((len(names) - 1) * (len(seeds) - 1))
    same = [
        _latent_correlation(a[i], a[j]) for a in answers for i in range(len(a)) for j in range(i)
    ]
    other = [
        _latent_correlation(answers[i, k], answers[j, k])
        for i in range(len(names)) for j in range(i) for k in range(len(seeds))
    ]  # fmt: skip
    return Noise(
        num_questions=answers.shape[2],
        default=float(answers[names.index(DEFAULT)].mean()),
        deviation=math.sqrt(variance),
        common=max(0.0, 1 - rest / variance),
        same=statistics.fmean(same),
        other=statistics.fmean(other),
    )


def _latent_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two normal variables of which the answers say the sign."""
    limits, both = stats.norm.ppf([a.mean(), b.mean()]), float((a * b).mean())

    def excess(correlation: float) -> float:
        covariance = [[1, correlation], [correlation, 1]]
        return float(stats.multivariate_normal(cov=covariance).cdf(limits)) - both

    return float(optimize.brentq(excess, -0.99, 0.99, xtol=1e-3))


@cache
def recorded_finals() -> np.ndarray:
    """Return float[240]: what random configurations reach."""
    curves = [json.loads(line) for line in CURVES.read_text().splitlines()]
    return np.array([curve["reports"][-1][1] for curve in curves])


class World:
    """A search, and all runs that may confirm it. Number 0 is the default configuration."""

    def __init__(self, gain: float | None, seed: int) -> None:
        """
        Args:
            gain: of the best trial over the default configuration; None takes the recorded one,
                and with 0 all are equal.
        """
        self._noise, self._seed = recorded_noise(), seed
        noise, rng = self._noise, np.random.default_rng([seed, 0])
        trials = rng.choice(recorded_finals(), NUM_TRIALS, replace=False)
        if gain == 0:
            trials = np.full_like(trials, trials.max())
        default = noise.default if gain is None else trials.max() - gain
        self.truths = np.array([default, *trials])
        self._shared = rng.normal(0, math.sqrt(noise.other), noise.num_questions)
        self._runs = dict[tuple[int, int], np.ndarray]()
        self.reached = {n: float(self.run(n, -1).mean()) for n in range(1, NUM_TRIALS + 1)}
        self.ranked = sorted(self.reached, key=lambda n: -self.reached[n])
        self._expected = dict[int, float]()

    def run(self, number: int, seed_round: int) -> np.ndarray:
        """Return int[questions]: 1 for a right answer of this run; the search is round -1."""
        if (number, seed_round) not in self._runs:
            noise = self._noise
            common = np.random.default_rng([self._seed, 1, seed_round + 1]).normal()
            rng = np.random.default_rng([self._seed, 2, seed_round + 1, number])
            luck = math.sqrt(noise.common) * common + math.sqrt(1 - noise.common) * rng.normal()
            own = rng.normal(0, math.sqrt(1 - noise.same), noise.num_questions)
            latent = self._shared + self._own(number) + own
            self._runs[number, seed_round] = (latent < self._limit(number, luck)).astype(int)
        return self._runs[number, seed_round]

    def expected(self, number: int) -> float:
        """Return the accuracy of a configuration on these questions, the mean over all seeds."""
        if number not in self._expected:
            rest = math.sqrt(1 - self._noise.same)
            limits = self._limit(number, _NODES)[:, None] - self._shared - self._own(number)
            means = special.ndtr(limits / rest).mean(axis=1)
            self._expected[number] = float((_WEIGHTS * means).sum() / _WEIGHTS.sum())
        return self._expected[number]

    def _own(self, number: int) -> np.ndarray:
        deviation = math.sqrt(max(0.0, self._noise.same - self._noise.other))
        rng = np.random.default_rng([self._seed, 3, number])
        return rng.normal(0, deviation, self._noise.num_questions)

    def _limit(self, number: int, luck: float | np.ndarray) -> np.ndarray:
        logit = special.logit(self.truths[number]) + self._noise.deviation * np.asarray(luck)
        return special.ndtri(special.expit(logit))


@dataclass(frozen=True)
class Outcome:
    """What a rule has come to in one search."""

    num_runs: int
    regret: float
    """What the winner truly lacks to the best of the trials and the default one."""
    beats: bool
    """Whether it says that the winner beats the default configuration."""
    error: float
    """Of the best candidate's gain, on these questions."""
    covers: bool | None
    """Whether its interval over seeds holds the truth; None without an interval."""


Rule = Callable[[World], Outcome]
Values = Mapping[int, Sequence[float]]
"""Of each configuration, the accuracies on the first seeds."""


def race(**confirm: int) -> Rule:
    """Return the race with these settings of `confirm`."""

    def rule(world: World) -> Outcome:
        contest = Race.between(world.ranked, 0, Confirm(**confirm), world.reached)
        results = dict[tuple[int, int], float | None]()
        while wanted := contest.next_runs(results):
            results[wanted[0]] = float(world.run(*wanted[0]).mean())
        values = {n: [float(world.run(n, r).mean()) for m, r in sorted(results) if m == n]
                  for n in {number for number, _ in results}}  # fmt: skip
        best = max(contest.candidates, key=lambda n: (len(values[n]), statistics.fmean(values[n])))
        num_seeds = len(values[best])
        gains = [a - b for a, b in zip(values[best], values[0][:num_seeds], strict=True)]
        return outcome(world, values, best, paired_interval(gains))

    return rule


def fixed(top: int, num_seeds: int) -> Rule:
    """Return the rule that was there before: so many seeds for each, one spread for all."""

    def rule(world: World) -> Outcome:
        numbers = [0, *world.ranked[:top]]
        values = {n: [float(world.run(n, r).mean()) for r in range(num_seeds)] for n in numbers}
        best = max(numbers[1:], key=lambda n: statistics.fmean(values[n]))
        spread, interval = pooled_spread([*values.values()]), None
        if spread is not None:
            gain = statistics.fmean(values[best]) - statistics.fmean(values[0])
            half = spread.difference_half_width(num_seeds, num_seeds)
            interval = gain - half, gain + half
        return outcome(world, values, best, interval, one_seed_suffices=True)

    return rule


def outcome(
    world: World,
    values: Values,
    best: int,
    interval: tuple[float, float] | None,
    one_seed_suffices: bool = False,
) -> Outcome:
    """Return what a rule says whose best candidate has this interval over seeds."""
    rounds = range(len(values[best]))
    gain = statistics.fmean(values[best]) - statistics.fmean(values[0][: len(rounds)])
    sums = np.sum([world.run(best, r) - world.run(0, r) for r in rounds], axis=0)
    p_value = mcnemar_exact(int((sums > 0).sum()), int((sums < 0).sum()))
    difference = {"mean": gain, "p_value": p_value, "seeds_interval_95": interval}
    beats = gain_counts([{"difference_to_default": difference}], OBJECTIVE)
    if interval is None and one_seed_suffices:
        beats = gain > 0 and p_value < 0.05
    truth = world.expected(best) - world.expected(0)
    winner = best if gain > 0 else 0
    return Outcome(
        num_runs=sum(map(len, values.values())),
        regret=float(world.truths.max() - world.truths[winner]),
        beats=beats,
        error=gain - truth,
        covers=None if interval is None else interval[0] <= truth <= interval[1],
    )


RULES: Mapping[str, Rule] = {
    "top 3 x 2 seeds (before)": fixed(3, 2),
    "top 6 x 1 seed": fixed(6, 1),
    "race, 8 runs (default)": race(),
    "race, 12 runs": race(runs=12),
    "top 1 x 2 seeds (before)": fixed(1, 2),
    "race of the best, 8 runs": race(top=1),
}
KINDS: Mapping[str, float | None] = {
    "the default configuration as recorded": None,
    "the best trial is 1 point better": 0.01,
    "the best trial is 3 points better": 0.03,
    "all are equal": 0.0,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--searches", type=int, default=2000)
    arguments = parser.parse_args()
    print(recorded_noise())
    for name, gain in KINDS.items():
        outcomes: dict[str, list[Outcome]] = {rule: [] for rule in RULES}
        for seed in range(arguments.searches):
            world = World(gain, seed)
            for rule, decide in RULES.items():
                outcomes[rule].append(decide(world))
        print(f"\n{name}, {arguments.searches} searches")
        for rule, those in outcomes.items():
            print(describe(rule, those), flush=True)


def describe(rule: str, outcomes: Sequence[Outcome]) -> str:
    """Return a line; regret and bias in points of accuracy, each with its standard error."""
    regrets = [100 * o.regret for o in outcomes]
    errors = [100 * o.error for o in outcomes]
    covers = [o.covers for o in outcomes if o.covers is not None]
    coverage = f"{100 * statistics.fmean(covers):5.1f} %" if covers else "   -   "
    return (
        f"{rule:26} {statistics.fmean(o.num_runs for o in outcomes):4.1f} runs"
        f"   regret {_with_error(regrets)}"
        f"   beats {100 * statistics.fmean(o.beats for o in outcomes):5.1f} %"
        f"   interval holds the truth {coverage}   bias {_with_error(errors)}"
    )


def _with_error(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
