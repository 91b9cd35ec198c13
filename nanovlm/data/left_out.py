"""Rows that cannot be used: which ones, why, and how many of them are too many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanovlm.data.rows import Subset
from nanovlm.errors import UserError

_MAX_NAMED = 3


class BadCell(NamedTuple):
    """Why a row cannot be used."""

    column: str
    reason: str


def locate(subsets: Sequence[Subset], row: int) -> dict[str, Any]:
    """Return `subset`, `file` and `row` (from 0 in the file) of a row counted through all; JSON."""
    for subset in subsets:
        if row < subset.num_rows:
            return subset.locate(row)
        row -= subset.num_rows
    raise AssertionError(f"row {row} behind the last one")


def describe_bad(subsets: Sequence[Subset], bad: Mapping[int, BadCell]) -> list[dict[str, Any]]:
    """Return `subset, file, row, column, reason` of bad rows, counted through all; JSON."""
    return [locate(subsets, row) | cell._asdict() for row, cell in sorted(bad.items())]


def describe_place(place: Mapping[str, Any]) -> str:
    """Return `ai2d/train-00000-of-00001.parquet row 7` for what `locate` returns."""
    return f"{place['file'] or place['subset']} row {place['row']}"


def check_bad_rows(
    what: str, bad: Sequence[Mapping[str, Any]], num_rows: int, max_bad_fraction: float
) -> None:
    """Raise UserError if more than a share of the rows cannot be read.

    Args:
        what: the data, for the message.
        bad: of `describe_bad`.
        num_rows: rows that are, or would be, used: without an image or a turn there is no use.
    """
    if len(bad) <= max_bad_fraction * num_rows:
        return
    named = "; ".join(
        f"{describe_place(b)}, {b['column']}: {b['reason']}" for b in bad[:_MAX_NAMED]
    )
    more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
    by_subset = Counter(b["subset"] for b in bad)
    where = ", ".join(f"{name}: {number}" for name, number in sorted(by_subset.items()))
    raise UserError(
        f"{what}: at least {len(bad)} of {num_rows} rows cannot be read ({where}), more than "
        f"max_bad_fraction={max_bad_fraction:g} allows: {named}{more}"
    )
