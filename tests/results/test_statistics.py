"""Paired comparisons against scipy, a textbook and what must hold whatever the numbers are."""

import math
import random
import statistics
from pathlib import Path

import pytest
from scipy import stats

from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar_result import MMStarResult
from nanovlm.results.read import read_answers
from nanovlm.results.statistics import (
    RankCorrelation,
    compare_answers,
    mcnemar_exact,
    paired_interval,
    paired_p_value,
    pooled_spread,
    rank_correlation,
    wilson_interval,
)
from tests.results.answers import write_answers


def answers(*counts: int) -> tuple[dict[int, bool], dict[int, bool]]:
    """Return the answers of A and B: so many questions right by both, A alone, B alone, neither."""
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    items = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return dict(enumerate(a for a, _ in items)), dict(enumerate(b for _, b in items))


def random_answers(num_items: int, probability: float, seed: int) -> dict[int, bool]:
    rng = random.Random(seed)
    return {item: rng.random() < probability for item in range(num_items)}


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (3, 3), (2, 9), (40, 61), (150, 86), (700, 801)]
)
def test_p_is_that_of_an_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_b, only_a) == mcnemar_exact(only_a, only_b)


def test_the_approval_ratings_of_a_textbook() -> None:
    # Agresti, Categorical Data Analysis: 794 and 570 agree, 150 and 86 do not; of 1,600 that is a
    # change of 0.040, 95 % interval (0.021, 0.059).
    result = compare_answers(*[[each] for each in answers(794, 150, 86, 570)])
    assert result.p_value == pytest.approx(3.716e-5, rel=1e-3)
    assert (result.num_items, result.only_a, result.only_b) == (1600, 150, 86)
    assert result.difference == pytest.approx(0.040)
    assert result.interval_95 is not None
    assert result.interval_95 == pytest.approx((0.021, 0.059), abs=5e-4)


def test_p_of_a_great_many_questions_is_a_number() -> None:
    assert mcnemar_exact(20_000, 20_100) == pytest.approx(0.62, abs=0.01)
    assert mcnemar_exact(0, 5_000) == 0.0  # 2^-4999 is below the smallest number there is


def test_equal_answers_are_no_difference() -> None:
    same = random_answers(100, 0.4, seed=0)
    result = compare_answers([same, same], [same, same])
    assert (result.difference, result.p_value, result.interval_95) == (0.0, 1.0, (0.0, 0.0))


def test_seeds_that_answer_alike_do_not_count_as_more_questions() -> None:
    a, b = random_answers(200, 0.6, seed=1), random_answers(200, 0.5, seed=2)
    assert compare_answers([a, a, a], [b, b, b]) == compare_answers([a], [b])


def test_exchanging_the_two_changes_the_sign_alone() -> None:
    a = [random_answers(300, 0.6, seed) for seed in (1, 2)]
    b = [random_answers(300, 0.5, seed) for seed in (3, 4)]
    there, back = compare_answers(a, b), compare_answers(b, a)
    assert there.interval_95 is not None and back.interval_95 is not None
    assert there.difference == -back.difference > 0
    assert there.interval_95 == tuple(-end for end in reversed(back.interval_95))
    assert (there.p_value, there.only_a) == (back.p_value, back.only_b)


def test_the_questions_are_the_sample_and_their_differences_are_summed_over_seeds() -> None:
    a = [{0: True, 1: True, 2: False, 3: True}, {0: True, 1: False, 2: False, 3: True}]
    b = [{0: False, 1: False, 2: True, 3: True}, {0: False, 1: True, 2: False, 3: True}]
    result = compare_answers(a, b)  # question by question +2, 0, -1, 0
    assert (result.only_a, result.only_b, result.p_value) == (1, 1, 1.0)
    assert result.difference == 1 / 8
    half = 1.959964 * statistics.stdev([1, 0, -0.5, 0]) / math.sqrt(4)
    assert result.interval_95 == pytest.approx((1 / 8 - half, 1 / 8 + half))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(400):
        a = [random_answers(150, 0.6, 4 * seed + s) for s in (0, 1)]
        b = [random_answers(150, 0.5, 4 * seed + s) for s in (2, 3)]
        interval = compare_answers(a, b).interval_95
        assert interval is not None
        covered += interval[0] <= 0.1 <= interval[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_one_question_has_no_interval() -> None:
    assert compare_answers([{7: True}], [{7: False}]).interval_95 is None


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare_answers([{1: True, 2: True}], [{1: True, 3: True}])


@pytest.mark.parametrize("level", [0.95, 0.975])
def test_the_interval_over_seeds_is_that_of_a_paired_t_test(level: float) -> None:
    a, b = [0.97, 0.975, 0.962], [0.84, 0.77, 0.81]
    test = stats.ttest_rel(a, b)
    expected = test.confidence_interval(level)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert paired_interval(differences, level) == pytest.approx((expected.low, expected.high))
    assert paired_p_value(differences) == pytest.approx(test.pvalue)


def test_an_interval_over_seeds_takes_two() -> None:
    assert paired_interval([0.5]) is None
    assert paired_interval([0.25, 0.25]) == (0.25, 0.25)
    assert paired_p_value([0.25, 0.25]) == 0 < paired_p_value([0.0, 0.0])


def test_the_spread_is_pooled_within_the_configurations() -> None:
    spread = pooled_spread([[0.5, 0.7], [0.1, 0.2, 0.3], [0.9], []])
    assert spread is not None
    assert spread.degrees == 3
    assert spread.deviation == pytest.approx(math.sqrt((0.02 + 0.02) / 3))
    assert pooled_spread([[0.9], [0.1]]) is None


def test_two_groups_have_the_interval_of_a_t_test() -> None:
    a, b = [0.5, 0.7, 0.6], [0.3, 0.4]
    spread = pooled_spread([a, b])
    assert spread is not None
    expected = stats.ttest_ind(a, b).confidence_interval(0.95)
    half = spread.difference_half_width(len(a), len(b))
    assert half == pytest.approx((expected.high - expected.low) / 2)


def test_answers_are_read_as_the_evaluation_writes_them(tmp_path: Path) -> None:
    result = MMStarResult(
        indices=(4, 2, 9),
        answers=("A", "B", "C"),
        outputs=("A", "The answer is B", "A"),
        correct=(True, True, False),
        letters=("A", "D", "C"),
        letter_nlls=(0.1, 2.0, 0.3),
        categories=("c",) * 3,
        l2_categories=("x",) * 3,
    )
    path = tmp_path / "trial-0001.jsonl"
    path.write_text(result.json_lines())
    assert read_answers(path) == {4: True, 2: True, 9: False}
    by_letter = read_answers(path, "mmstar_letter_accuracy")
    assert by_letter == {4: True, 2: False, 9: True}
    for metric, read in (
        ("mmstar_accuracy", read_answers(path)),
        ("mmstar_letter_accuracy", by_letter),
    ):
        assert sum(read.values()) / len(read) == result.metrics()[metric]


@pytest.mark.parametrize("bad", ['{"index": 3, "corr', '{"index": 3}', "[1]", "null"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, bad: str) -> None:
    path = write_answers(tmp_path / "a.jsonl", {1: True})
    path.write_text(path.read_text() + bad)
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: is not an answer"):
        read_answers(path)


@pytest.mark.parametrize("num_values", [1, 2, 5, 10_000])
def test_a_rank_correlation_that_grows_is_that_of_all_pairs(num_values: int) -> None:
    rng, grows = random.Random(num_values), RankCorrelation()
    pairs = [(rng.randrange(num_values) / 7, -rng.randrange(num_values) / 3) for _ in range(100)]
    for number, pair in enumerate(pairs, start=1):
        grows.add(*pair)
        if number > 1:
            ones, others = zip(*pairs[:number], strict=True)
            assert grows.num_pairs == number
            assert grows.value() == pytest.approx(rank_correlation(ones, others), abs=1e-12)


def test_the_sign_of_a_rank_correlation_is_exact() -> None:
    grows = RankCorrelation()
    for one, other in zip((1, 2, 3, 4), (2, 4, 1, 3), strict=True):  # none, which is not positive
        grows.add(one / 10, other / 10)
    assert grows.value() == 0.0


@pytest.mark.parametrize(("num_right", "num_items"), [(0, 400), (13, 400), (1500, 1500), (1, 2)])
def test_the_interval_of_a_proportion_is_wilsons(num_right: int, num_items: int) -> None:
    expected = stats.binomtest(num_right, num_items).proportion_ci(0.95, method="wilson")
    interval = wilson_interval(num_right / num_items, num_items)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)
