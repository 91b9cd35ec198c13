"""Whether one configuration is better than another: on the same questions, and over seeds.

Two sources of chance are told apart. Other questions would have given other accuracies: that is
what the comparison question by question measures. Another seed would have trained another model:
that is what the spread between seeds measures.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovlm.results.read import read_answer_lines

ANSWER_METRICS = ("mmstar_accuracy", "mmstar_letter_accuracy")
"""The metrics that the answers to single questions decide."""

Answers = Mapping[int, bool]
"""Whether each question was answered rightly, by the benchmark's own number of it."""

LEVEL = 0.95
"""Of an interval that nothing is said of."""

_Z_95 = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


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
    """Questions that A answers rightly with more of its seeds than B does."""
    only_b: int


def compare_answers(a: Sequence[Answers], b: Sequence[Answers]) -> PairedComparison:
    """Compare two configurations by their answers, one mapping for each seed, in the same order.

    The questions are the sample: of each, the difference is summed over the seeds, so that several
    seeds do not pass for several times the questions. The interval is normal, from the spread of
    these sums; it says nothing about other seeds (`paired_interval` does).

    Raises:
        ValueError: not all were asked the same questions.
    """
    items = a[0].keys()
    if any(answers.keys() != items for answers in (*a, *b)):
        raise ValueError("not all were asked the same questions")
    sums = [
        sum(this[item] - other[item] for this, other in zip(a, b, strict=True)) for item in items
    ]
    only_a, only_b = sum(d > 0 for d in sums), sum(d < 0 for d in sums)
    difference = sum(sums) / (len(sums) * len(a))
    interval = None
    if len(sums) > 1:
        half = _Z_95 * statistics.stdev(sums) / len(a) / math.sqrt(len(sums))
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
        only_a: questions that A alone answers rightly.
        only_b: and B alone; those that both or neither do tell nothing.
    """
    num = only_a + only_b
    tail, ways = 0, 1
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (num - k) // (k + 1)  # to choose k + 1 of them
    return min(1.0, 2 * tail / 2**num)  # of whole numbers: exact, however many there are


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
        return student_t(self.degrees, level) * error


def pooled_spread(groups: Sequence[Sequence[float]]) -> Spread | None:
    """Return the spread within the groups, each the values of one configuration.

    Two seeds of one configuration alone would leave the spread all but unknown; pooled, those of
    four configurations have four degrees of freedom. None if no group has two values.
    """
    degrees = sum(len(values) - 1 for values in groups if values)
    if not degrees:
        return None
    squares = math.fsum(
        (value - statistics.fmean(values)) ** 2 for values in groups for value in values
    )
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
    mean = statistics.fmean(differences)
    half = student_t(len(differences) - 1, level) * _standard_error(differences)
    return mean - half, mean + half


def paired_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p of no difference: `paired_interval` of a level holds 0 if p is at
    least 1 - level. Takes two seeds or more."""
    mean, error = statistics.fmean(differences), _standard_error(differences)
    if not error:
        return 0.0 if mean else 1.0
    return 1 - _student_t_within(abs(mean) / error, len(differences) - 1)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def student_t(degrees: int, level: float = LEVEL) -> float:
    """Return what |T| of Student's t exceeds with probability 1 - `level`, by bisection."""
    low, high = 0.0, 1.0
    while _student_t_within(high, degrees) < level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _student_t_within(middle, degrees) < level else (low, middle)
    return middle


def _student_t_within(t: float, degrees: float) -> float:
    """Return P(|T| <= t): with t = sqrt(degrees) tan(x) the density is cos(x)^(degrees - 1) but for
    a factor, which is smooth, so that Simpson's rule is exact to six digits and more."""
    end, steps = math.atan(t / math.sqrt(degrees)), 200
    heights = [math.cos(end * k / steps) ** (degrees - 1) for k in range(steps + 1)]
    area = math.fsum((*heights, *heights[1:-1], *heights[1:-1:2], *heights[1:-1:2])) * end / steps
    whole = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    return 2 / 3 * area / math.sqrt(math.pi) / math.exp(whole)


def read_answers(path: Path, metric: str = "mmstar_accuracy") -> dict[int, bool]:
    """Return what `answers/<trial_id>.jsonl` says of each question, by its own number.

    Args:
        metric: of `ANSWER_METRICS`: whether the answer in words is right, or the likeliest letter.

    Raises:
        UserError: the file is not one of answers, or it is cut.
    """
    assert metric in ANSWER_METRICS, metric
    return {
        item["index"]: item["correct"]
        if metric == "mmstar_accuracy"
        else item["letter"] == item["answer"]
        for item in read_answer_lines(path)
    }
