"""What is known of the benchmark's questions besides prompt and image, and what it must be.

All is read before anything is prepared: a score over fewer questions would be another benchmark's,
so a value that cannot be used is an error, and one that is told before the training.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanovlm.data.left_out import describe_place, locate
from nanovlm.data.rows import BadValue, Subset
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
