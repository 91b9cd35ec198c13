"""The benchmark's questions: what they must be, and which of them are kept apart.

All is read before anything is prepared: a score over fewer questions would be another benchmark's,
so a value that cannot be used is an error, and one that is told before the training.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from nanovlm.config import BenchmarkPart
from nanovlm.data.left_out import describe_place, locate
from nanovlm.data.rows import BadValue, Subset
from nanovlm.data.tensors import PreparedBenchmark
from nanovlm.errors import UserError

ITEM_COLUMNS = ("index", "answer", "category", "l2_category")
_ALL_COLUMNS = ("question", *ITEM_COLUMNS)
_MAX_NAMED = 5


def benchmark_items(place: str, subsets: Sequence[Subset]) -> dict[str, list[Any]]:
    """Return the columns `ITEM_COLUMNS` of all rows.

    Args:
        place: the setting that names the benchmark, for the message.

    Raises:
        UserError: a value of a column, the question's among them, is null, empty or no text;
            questions cannot be told apart by their index, or two sets of them by their name.
    """
    columns = {name: _read(subsets, name) for name in _ALL_COLUMNS}
    wrong = [
        f"{place}: {describe_place(locate(subsets, row))}: {name} {problem}"
        for name, values in columns.items()
        for row, value in enumerate(values)
        if (problem := _problem(value))
    ]
    if wrong:
        more = len(wrong) - _MAX_NAMED
        tail = [f"{place}: and {more} more such values"] if more > 0 else []
        raise UserError(*wrong[:_MAX_NAMED], *tail)
    twice = _repeated(columns["index"])
    if twice:
        raise UserError(
            f"{place}: the column index must tell all questions apart; "
            f"{', '.join(map(str, twice[:_MAX_NAMED]))} stand more than once"
        )
    _check_names(place, columns)
    return {name: columns[name] for name in ITEM_COLUMNS}


def _read(subsets: Sequence[Subset], column: str) -> list[Any]:
    groups = (group for subset in subsets for group in subset.groups)
    return [v for group in groups for v in group.read(column, np.arange(group.num_rows))]


def _problem(value: Any) -> str | None:
    if value is None:
        return "is null"
    if isinstance(value, BadValue):
        return f"is {value.reason}"
    return "is empty" if isinstance(value, str) and not value.strip() else None


def _check_names(place: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError if an axis would have its accuracy under another one's name."""
    pairs = sorted(set(zip(columns["category"], columns["l2_category"], strict=True)))
    names = [*sorted({category for category, _ in pairs}), *map("/".join, pairs)]
    same = _repeated(names)
    if same:
        raise UserError(
            f"{place}: category and category/l2_category must name each set of questions "
            f"differently; {', '.join(map(repr, same[:_MAX_NAMED]))} stand for several"
        )


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value, times in Counter(values).items() if times > 1]


SPLIT_NAME = "mmstar_holdout"
"""Goes into the hash of each question; another name would divide otherwise."""


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
    return _select(benchmark, items)


def holdout_items(benchmark: PreparedBenchmark, share: Fraction) -> set[int]:
    """Return the places of the questions that are kept apart.

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
        for item in sorted(items, key=lambda i: _rank(benchmark.indices[i]))[: sizes[names]]
    }


def _rank(index: int) -> bytes:
    return hashlib.sha256(f"{SPLIT_NAME} {index}".encode()).digest()


def _select(benchmark: PreparedBenchmark, items: list[int]) -> PreparedBenchmark:
    lengths = benchmark.offsets.diff()[items]
    starts = benchmark.offsets[:-1][items]
    return PreparedBenchmark(
        images=benchmark.images,
        image_index=benchmark.image_index[items],
        tokens=torch.cat(
            [
                benchmark.tokens[start : start + length]
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
        ),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        answers=tuple(benchmark.answers[item] for item in items),
        categories=tuple(benchmark.categories[item] for item in items),
        l2_categories=tuple(benchmark.l2_categories[item] for item in items),
        indices=tuple(benchmark.indices[item] for item in items),
    )
