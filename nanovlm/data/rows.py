"""Rows in parquet files, read a row group at a time: the largest part that must be in memory.

Nothing is copied to disk on the way, as `datasets` does, which for the_cauldron would take as much
disk again as the download.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanovlm.errors import UserError

_BATCH_ROWS = 64
_BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class BadValue:
    """Stands for a value that is in the file and cannot be read."""

    reason: str


class RowGroup(Protocol):
    """Some rows that lie together; picklable."""

    @property
    def num_rows(self) -> int: ...

    @property
    def file(self) -> str | None:
        """Where the rows lie, in short: `FOLDER/FILE`; None if they are in no file."""
        ...

    @property
    def first_row(self) -> int:
        """Rows of the file that lie before these."""
        ...

    def read(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        """Yield the values of `column` in the rows `rows` (ascending, int64[n]), as Python's.

        A null is None, and text that is no text a `BadValue`.
        """
        ...


@dataclass(frozen=True)
class ParquetGroup:
    """A row group of a parquet file."""

    path: Path
    index: int
    num_rows: int
    first_row: int

    @property
    def file(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    def read(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        try:
            with pq.ParquetFile(
                self.path, memory_map=True, page_checksum_verification=True
            ) as file:
                number = _rows_at_once(file.metadata.row_group(self.index), column)
                batches = file.iter_batches(number, row_groups=[self.index], columns=[column])
                yield from _values_at(batches, rows)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.path}: column {column} of row group {self.index} cannot be read: {error}; "
                "a file that was damaged on its way is to be fetched anew"
            ) from error


@dataclass(frozen=True)
class TableGroup:
    """A table in memory."""

    table: pa.Table
    file: None = None
    first_row: int = 0

    @property
    def num_rows(self) -> int:
        return int(self.table.num_rows)

    def read(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        yield from _values_at(self.table.select([column]).to_batches(_BATCH_ROWS), rows)


@dataclass(frozen=True)
class Subset:
    """The rows of one sub-set of a data set."""

    name: str
    groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)

    def locate(self, row: int) -> dict[str, Any]:
        """Return `subset`, `file` and `row` (from 0 in the file) of a row of the sub-set; JSON."""
        for group in self.groups:
            if row < group.num_rows:
                return {"subset": self.name, "file": group.file, "row": group.first_row + row}
            row -= group.num_rows
        raise AssertionError(f"row {row} behind the last one of {self.name}")


def parquet_groups(path: Path) -> list[ParquetGroup]:
    """Return the row groups of a file that have rows. Raises pyarrow's errors if it is broken."""
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    ends = accumulate(sizes)
    return [
        ParquetGroup(path, index, size, end - size)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size
    ]


@dataclass(frozen=True)
class Chosen:
    """The chosen ones of a row group's rows."""

    group: RowGroup
    rows: np.ndarray
    """int64[n], ascending, from 0 in the group."""
    first: int
    """How many chosen rows lie before them, in earlier groups."""


def choose(subsets: Sequence[Subset], rows: np.ndarray) -> list[Chosen]:
    """Return where the rows `rows` (ascending, counted through all sub-sets) lie, by group."""
    chosen, start, first = [], 0, 0
    for group in chain.from_iterable(subset.groups for subset in subsets):
        last = int(np.searchsorted(rows, start + group.num_rows))
        if last > first:
            chosen.append(Chosen(group, rows[first:last] - start, first))
        start, first = start + group.num_rows, last
    return chosen


def in_parts(chosen: Sequence[Chosen], num_rows: int) -> list[list[Chosen]]:
    """Return consecutive groups together so that each part has `num_rows` rows or a few more.

    The rows of a large group are divided: a part is what may be lost, and what is in memory.
    """
    parts: list[list[Chosen]] = [[]]
    for group in chain.from_iterable(_divided(group, num_rows) for group in chosen):
        if sum(len(part.rows) for part in parts[-1]) >= num_rows:
            parts.append([])
        parts[-1].append(group)
    return [part for part in parts if part]


def _divided(chosen: Chosen, num_rows: int) -> Iterator[Chosen]:
    for start in range(0, len(chosen.rows), num_rows):
        yield Chosen(chosen.group, chosen.rows[start : start + num_rows], chosen.first + start)


def _rows_at_once(group: pq.RowGroupMetaData, column: str) -> int:
    """Return how many rows' values of `column` are read together: fewer where they are large."""
    chunks = map(group.column, range(group.num_columns))
    sizes = [c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column]
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, sum(sizes))))


def _values_at(batches: Iterator[pa.RecordBatch], rows: np.ndarray) -> Iterator[Any]:
    start = 0
    for batch in batches:
        if start > rows[-1]:
            return
        low, high = np.searchsorted(rows, [start, start + batch.num_rows])
        if high > low:
            yield from map(_as_python, batch.column(0).take(pa.array(rows[low:high] - start)))
        start += batch.num_rows


def _as_python(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:  # nobody else has looked: parquet stores any bytes as text
        return BadValue(f"text that is not UTF-8: {error.reason} at byte {error.start}")
