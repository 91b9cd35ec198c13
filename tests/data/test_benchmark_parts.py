"""The two parts of the benchmark: sizes, strata, and that nothing else decides the division."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer

from nanovlm.config.schema import BenchmarkPart
from nanovlm.data.benchmark import PreparedBenchmark, select_part
from nanovlm.data.prepared import prepare_benchmark
from nanovlm.data.samples import ImageSlots
from nanovlm.errors import UserError
from tests.data.conftest import CONFIG

AXES_OF_MMSTAR = [
    (f"capability {c}", f"axis {c}{a}", 83 + (a != 0)) for c in range(6) for a in range(3)
]
"""18 axes of 83 and 84 questions, 1,506 in all."""

DIGITS_HOLDOUT = (168, 201, 353, 423, 448, 456, 678, 812, 895, 1001, 1104, 1171)
"""A hundredth of builtin:digits."""


def questions(strata: Sequence[tuple[str, str, int]], seed: int = 0) -> PreparedBenchmark:
    """Return so many questions of each (category, axis), mixed; question i has i % 7 + 1 tokens."""
    names = [(category, axis) for category, axis, size in strata for _ in range(size)]
    own_numbers = list(range(100, 100 + len(names)))
    mixed = list(zip(own_numbers, names, strict=True))
    random.Random(seed).shuffle(mixed)
    lengths = torch.tensor([number % 7 + 1 for number, _ in mixed])
    tokens = [torch.full((number % 7 + 1,), number, dtype=torch.int32) for number, _ in mixed]
    return PreparedBenchmark(
        images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
        slots=ImageSlots.one_each(torch.tensor([number % 3 for number, _ in mixed])),
        tokens=torch.cat(tokens),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        answers=tuple("ABCD"[number % 4] for number, _ in mixed),
        categories=tuple(category for _, (category, _) in mixed),
        l2_categories=tuple(axis for _, (_, axis) in mixed),
        indices=tuple(number for number, _ in mixed),
    )


@pytest.mark.parametrize("holdout", [0.5, 0.1, 1 / 3, 0.999])
def test_the_parts_are_disjoint_and_together_all(holdout: float) -> None:
    benchmark = questions(AXES_OF_MMSTAR)
    search, kept = (select_part(benchmark, holdout, part) for part in ("search", "holdout"))
    assert set(search.indices).isdisjoint(kept.indices)
    assert set(search.indices) | set(kept.indices) == set(benchmark.indices)
    assert len(kept) == round(holdout * len(benchmark))


@pytest.mark.parametrize("holdout", [0.5, 0.1, 1 / 3])
def test_every_axis_keeps_its_share(holdout: float) -> None:
    benchmark = questions(AXES_OF_MMSTAR)
    kept = Counter(select_part(benchmark, holdout, "holdout").l2_categories)
    for axis, size in Counter(benchmark.l2_categories).items():
        assert abs(kept[axis] - holdout * size) < 1


def test_an_axis_of_the_same_name_in_another_category_is_a_stratum_of_its_own() -> None:
    benchmark = questions([("a", "same", 40), ("b", "same", 10)])
    kept = select_part(benchmark, 0.5, "holdout")
    assert Counter(kept.categories) == {"a": 20, "b": 5}


def test_largest_remainders_are_rounded_up() -> None:
    # 0.3 of 10 is 3: of 2, 3 and 5 questions 0.6, 0.9 and 1.5, and so 0 + 1, 0 + 1 and 1.
    kept = select_part(questions([("a", "", 2), ("b", "", 3), ("c", "", 5)]), 0.3, "holdout")
    assert Counter(kept.categories) == {"a": 1, "b": 1, "c": 1}


def test_a_question_takes_all_that_is_its_own_along() -> None:
    benchmark = questions(AXES_OF_MMSTAR)
    for part in ("search", "holdout"):
        selected = select_part(benchmark, 0.4, part)
        places = [benchmark.indices.index(index) for index in selected.indices]
        assert places == sorted(places)
        for item, (place, number) in enumerate(zip(places, selected.indices, strict=True)):
            assert selected.prompt(item).tolist() == [number] * (number % 7 + 1)
            assert selected.slots.index[item] == number % 3
            assert selected.answers[item] == "ABCD"[number % 4]
            assert selected.categories[item] == benchmark.categories[place]
            assert selected.l2_categories[item] == benchmark.l2_categories[place]
        assert selected.images is benchmark.images


def test_the_order_of_the_questions_does_not_matter() -> None:
    first, second = (questions(AXES_OF_MMSTAR, seed) for seed in (0, 1))
    assert first.indices != second.indices
    kept = [select_part(benchmark, 0.5, "holdout").indices for benchmark in (first, second)]
    assert set(kept[0]) == set(kept[1])


def test_the_division_is_that_of_this_version(tokenizer: Tokenizer) -> None:
    # When this fails, a search that is resumed asks other questions than before.
    kept = select_part(prepare_benchmark(CONFIG, tokenizer), 0.01, "holdout")
    assert kept.indices == DIGITS_HOLDOUT


@pytest.mark.parametrize("part", get_args(BenchmarkPart))
def test_without_a_share_and_for_all_the_benchmark_is_whole(part: BenchmarkPart) -> None:
    benchmark = questions(AXES_OF_MMSTAR)
    assert select_part(benchmark, 0.0, part) is benchmark
    assert (select_part(benchmark, 0.5, part) is benchmark) == (part == "all")


def test_a_part_without_questions_is_refused() -> None:
    benchmark = questions([("a", "b", 3)])
    with pytest.raises(UserError, match=r"mmstar_holdout: .* got 0\.1 of 3 .*='holdout'"):
        select_part(benchmark, 0.1, "holdout")
    with pytest.raises(UserError, match=r"mmstar_holdout: .* got 0\.9 of 3 .*='search'"):
        select_part(benchmark, 0.9, "search")
