"""How much of a difference is chance: over questions, over seeds, and between rankings.

Two sources of chance are told apart. Other questions would have given other accuracies: that is
what the comparison question by question measures. Another seed would have trained another model:
that is what the spread between seeds measures.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which imports its parts at their first use: stats takes half a second

Answers = Mapping[int, bool]
"""Whether each question was answered correctly, by the benchmark's own number of it."""

LEVEL = 0.95
"""Of an interval whose level is not named."""

_NORMAL_95 = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)

NUM_ITEMS = "mmstar_num_items"
"""The metric that tells on how many questions the accuracies stand."""

ANSWER_METRICS = ("mmstar_accuracy", "mmstar_letter_accuracy")
"""The proportions of questions, which the answers to single ones decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """Configuration A against configuration B on the same questions, as accuracies."""

    difference: float
    """Accuracy of A - accuracy of B, the mean over the seeds."""
    interval_95: tuple[float, float] | None
    """What other questions of the same kind might have given; None with one question."""
    p_value: float
    """Of the exact two-sided sign test over the questions; with one seed that is McNemar's."""
    num_items: int
    only_a: int
    """Questions that A answers correctly with more of its seeds than B does."""
    only_b: int


def compare_answers(a: Sequence[Answers], b: Sequence[Answers]) -> PairedComparison:
    """Compare two configurations by their answers, one mapping for each seed, in the same order.

    The questions are the sample: of each, the mean over the seeds counts, so that several seeds do
    not pass for several times the questions. The interval is normal, from the spread of these
    means; it says nothing about other seeds (`paired_interval` does).

    Raises:
        ValueError: not all were asked the same questions.
    """
    items = a[0].keys()
    if any(answers.keys() != items for answers in (*a, *b)):
        raise ValueError("not all were asked the same questions")
    right = [[[answers[item] for item in items] for answers in side] for side in (a, b)]
    sums = np.subtract(*np.sum(right, axis=1, dtype=int))  # int[questions]
    only_a, only_b = int((sums > 0).sum()), int((sums < 0).sum())
    difference = float(sums.sum() / (len(sums) * len(a)))
    interval = None
    if len(sums) > 1:
        half = float(scipy.stats.norm.ppf((1 + LEVEL) / 2) * scipy.stats.sem(sums / len(a)))
        interval = difference - half, difference + half
    return PairedComparison(
        difference=difference,
        interval_95=interval,
        p_value=mcnemar_exact(only_a, only_b),
        num_items=len(sums),
        only_a=only_a,
        only_b=only_b,
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p: how often a fair coin is at least as uneven.

    Args:
        only_a: questions that A alone answers correctly.
        only_b: and B alone; those that both or neither do say nothing.
    """
    return min(1.0, 2 * float(scipy.stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How far the runs of one configuration lie apart: one figure for all configurations."""

    deviation: float
    """Standard deviation of a run."""
    degrees: int
    """Degrees of freedom of that estimate."""

    def difference_half_width(self, num_a: int, num_b: int, level: float = LEVEL) -> float:
        """Return half the interval of the difference of two means of so many runs."""
        error = self.deviation * math.sqrt(1 / num_a + 1 / num_b)
        return float(scipy.stats.t.ppf((1 + level) / 2, self.degrees)) * error


def pooled_spread(groups: Sequence[Sequence[float]]) -> Spread | None:
    """Return the spread within the groups, each the values of one configuration.

    Two seeds of one configuration alone would leave the spread all but unknown; pooled, those of
    four configurations have four degrees of freedom. None if no group has two values.
    """
    degrees = sum(len(values) - 1 for values in groups if values)
    if not degrees:
        return None
    squares = math.fsum(float(np.var(values)) * len(values) for values in groups if values)
    return Spread(deviation=math.sqrt(squares / degrees), degrees=degrees)


def paired_interval(
    differences: Sequence[float], level: float = LEVEL
) -> tuple[float, float] | None:
    """Return what other seeds might have given in place of the mean difference: Student's paired t.

    Of each seed that two configurations have both finished it takes the difference. What a seed
    does to both of them, as the order of the data, falls out, and neither has to lie as far apart
    as the other. None with one seed.
    """
    if len(differences) < 2:
        return None
    mean, t = float(np.mean(differences)), scipy.stats.t.ppf((1 + level) / 2, len(differences) - 1)
    half = float(t * scipy.stats.sem(differences))
    return mean - half, mean + half


def paired_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p of no difference: `paired_interval` of a level holds 0 if p is at
    least 1 - level. Takes two seeds or more."""
    mean, error = abs(float(np.mean(differences))), float(scipy.stats.sem(differences))
    if not error:
        return 0.0 if mean else 1.0
    return 2 * float(scipy.stats.t.sf(mean / error, len(differences) - 1))


def rank_correlation(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's correlation, from -1 to 1; 0 where one side has a single value."""
    if len({*ones}) == 1 or len({*others}) == 1:
        return 0.0
    return float(scipy.stats.spearmanr(ones, others).statistic)


class RankCorrelation:
    """Spearman's correlation of pairs that come one after another; a pair costs one pass over those
    before it, where `rank_correlation` orders them all again."""

    def __init__(self) -> None:
        self._values = np.empty((2, 16))  # float[sides, room for pairs]
        self._ranks = np.empty((2, 16))  # of equal values the mean of theirs
        self.num_pairs = 0
        self._found: float | None = None

    def add(self, one: float, other: float) -> None:
        n = self.num_pairs
        if n == self._values.shape[1]:
            self._values, self._ranks = (np.hstack([a, a]) for a in (self._values, self._ranks))
        for values, ranks, value in zip(self._values, self._ranks, (one, other), strict=True):
            greater, equal = values[:n] > value, values[:n] == value
            ranks[:n] += greater + 0.5 * equal
            values[n], ranks[n] = value, n - greater.sum() - 0.5 * equal.sum()
        self.num_pairs, self._found = n + 1, None

    def value(self) -> float:
        """Return it, from -1 to 1; 0 where one side has a single value. Its sign is exact."""
        if self._found is None:
            ones, others = self._ranks[:, : self.num_pairs] - (self.num_pairs - 1) / 2
            scale = math.sqrt((ones @ ones) * (others @ others))
            self._found = float(ones @ others) / scale if scale else 0.0
        return self._found


def wilson_interval(proportion: float, num_items: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, without continuity correction)."""
    squared = _NORMAL_95**2 / num_items
    middle = proportion + squared / 2
    half = math.sqrt(squared * (proportion * (1 - proportion) + squared / 4))
    return (middle - half) / (1 + squared), (middle + half) / (1 + squared)


def interval_95(metrics: Mapping[str, float], metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric over the benchmark's items, if it is a proportion."""
    if metric not in ANSWER_METRICS or NUM_ITEMS not in metrics:
        return None
    return wilson_interval(metrics[metric], int(metrics[NUM_ITEMS]))


def describe_accuracy(metrics: Mapping[str, float], metric: str) -> str:
    """Return the metric's value with its interval, such as `0.931 [0.915, 0.944]`."""
    interval = interval_95(metrics, metric)
    if interval is None:
        return f"{metrics[metric]:.4g}"
    return f"{metrics[metric]:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
