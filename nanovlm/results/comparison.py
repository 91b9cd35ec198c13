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

_Z_95 = statistics.NormalDist().inv_cdf(0.975)


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
    these sums; it says nothing about other seeds (`Spread` does).

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

    def difference_half_width(self, num_a: int, num_b: int) -> float:
        """Return half the 95 % interval of the difference of two means of so many runs."""
        error = self.deviation * math.sqrt(1 / num_a + 1 / num_b)
        return student_t_975(self.degrees) * error


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


def student_t_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, by bisection."""
    low, high = 1.0, 13.0  # 1.96 with endless degrees of freedom, 12.7 with one
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _student_t_within(middle, degrees) < 0.95 else (low, middle)
    return middle


def _student_t_within(t: float, degrees: int) -> float:
    """Return P(|T| <= t). Abramowitz and Stegun, formulas 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if odd else within


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
