"""The benchmark: its questions as tensors, a part of them, and what its columns must be."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovlm.config.schema import BenchmarkPart
from nanovlm.data.rows import BadValue, Subsets, describe_location, locate
from nanovlm.data.samples import ImageSlots
from nanovlm.errors import UserError

ITEM_COLUMNS = ("index", "answer", "category", "l2_category")
_MAX_NAMED = 5

SPLIT_NAME = "mmstar_holdout"
"""Goes into the hash of each question; another name would divide otherwise."""


@dataclass(frozen=True, eq=False)
class PreparedBenchmark:
    """N questions; the prompt of question i is `tokens[offsets[i] : offsets[i + 1]]`."""

    images: Tensor
    """uint8[R, 3, S, S]"""
    slots: ImageSlots
    tokens: Tensor
    """int32[all tokens], one prompt after the other."""
    offsets: Tensor
    """int64[N + 1]"""
    answers: tuple[str, ...]
    """The letter of each right option."""
    categories: tuple[str, ...]
    l2_categories: tuple[str, ...]
    indices: tuple[int, ...]
    """The benchmark's own number of each question."""

    def __len__(self) -> int:
        return len(self.answers)

    def prompt(self, item: int) -> Tensor:
        """Return the tokens of one question, int64[T]."""
        return self.tokens[self.offsets[item] : self.offsets[item + 1]].long()


def select_part(
    benchmark: PreparedBenchmark, holdout: float, part: BenchmarkPart
) -> PreparedBenchmark:
    """Return the questions of `part`, in the benchmark's order; images are shared, not copied.

    Args:
        holdout: share of the questions that is kept apart, from 0 to below 1.

    Raises:
        UserError: the part has no question.
    """
    if part == "all" or not holdout:
        return benchmark
    kept_apart = holdout_items(benchmark, Fraction(str(holdout)))
    wanted = part == "holdout"
    items = [item for item in range(len(benchmark)) if (item in kept_apart) == wanted]
    if not items:
        raise UserError(
            f"mmstar_holdout: must leave a question in each part of the benchmark, got {holdout} "
            f"of {len(benchmark)} questions and none for mmstar_part={part!r}"
        )
    lengths = benchmark.offsets.diff()[items]

    def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[item] for item in items)

    return replace(
        benchmark,
        slots=benchmark.slots.take(torch.tensor(items)),
        tokens=torch.cat([benchmark.prompt(item) for item in items]).int(),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        answers=chosen(benchmark.answers),
        categories=chosen(benchmark.categories),
        l2_categories=chosen(benchmark.l2_categories),
        indices=chosen(benchmark.indices),
    )


def holdout_items(benchmark: PreparedBenchmark, share: Fraction) -> set[int]:
    """Return the positions of the questions that are kept apart.

    They are `share` of all, rounded half up, and of each stratum its exact share rounded up or down
    (the method of largest remainders; of equal remainders the first by name is rounded up). A
    stratum is an axis within its capability, so where no axes are told apart it is the capability.
    Within a stratum those come first whose own number has the lowest SHA-256.
    """
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for item, names in enumerate(zip(benchmark.categories, benchmark.l2_categories, strict=True)):
        strata[names].append(item)
    exact = {names: share * len(items) for names, items in strata.items()}
    sizes = {names: int(size) for names, size in exact.items()}
    num_missing = int(share * len(benchmark) + Fraction(1, 2)) - sum(sizes.values())
    by_remainder = sorted(strata, key=lambda names: (sizes[names] - exact[names], names))
    for names in by_remainder[:num_missing]:
        sizes[names] += 1
    return {
        item
        for names, items in strata.items()
        for item in sorted(items, key=lambda i: _digest(benchmark.indices[i]))[: sizes[names]]
    }


def _digest(index: int) -> bytes:
    return hashlib.sha256(f"{SPLIT_NAME} {index}".encode()).digest()


def benchmark_items(setting: str, subsets: Subsets) -> dict[str, list[Any]]:
    """Return the columns `ITEM_COLUMNS` of all rows.

    They are read before anything is prepared: a score over fewer questions would be another
    benchmark's, so a value that cannot be used is an error, and known before the training.

    Args:
        setting: that names the benchmark, for the message.

    Raises:
        UserError: a value of a column, the question's among them, is null, empty or no text;
            questions cannot be told apart by their index, or two sets of them by their name.
    """
    columns = {
        name: [
            value
            for group in chain.from_iterable(subsets.values())
            for value in group.read(name, np.arange(group.num_rows))
        ]
        for name in ("question", *ITEM_COLUMNS)
    }
    wrong = [
        f"{setting}: {describe_location(locate(subsets, row))}: {name} {problem}"
        for name, values in columns.items()
        for row, value in enumerate(values)
        if (problem := _problem(value))
    ]
    if len(wrong) > _MAX_NAMED:
        wrong[_MAX_NAMED:] = [f"{setting}: and {len(wrong) - _MAX_NAMED} more such values"]
    if wrong:
        raise UserError(*wrong)
    if repeated := _repeated(columns["index"]):
        raise UserError(
            f"{setting}: the column index must tell all questions apart; {repeated} stand more "
            "than once"
        )
    _check_names(setting, columns)
    return {name: columns[name] for name in ITEM_COLUMNS}


def _problem(value: Any) -> str | None:
    if value is None:
        return "is null"
    if isinstance(value, BadValue):
        return f"is {value.reason}"
    return "is empty" if isinstance(value, str) and not value.strip() else None


def _check_names(setting: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError if an axis would have its accuracy under another one's name."""
    pairs = sorted(set(zip(columns["category"], columns["l2_category"], strict=True)))
    names = [*sorted({category for category, _ in pairs}), *map("/".join, pairs)]
    if repeated := _repeated(names):
        raise UserError(
            f"{setting}: category and category/l2_category must name each set of questions "
            f"differently; {repeated} stand for several"
        )


def _repeated(values: Iterable[Any]) -> str:
    """Return the first values that occur more than once, as text."""
    repeated = [repr(value) for value, times in Counter(values).items() if times > 1]
    return ", ".join(repeated[:_MAX_NAMED])
