"""Rows in parquet files, read a row group at a time: the largest part that must be in memory.

Nothing is copied to disk on the way, as `datasets` does, which for the_cauldron would take as much
disk again as the download.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from nanovlm.downloads import first_reason
from nanovlm.errors import UserError

_BATCH_ROWS = 64
_BATCH_BYTES = 32 * 2**20
_REQUEST_BYTES = 8 * 2**20
"""That are asked of the hub at a time."""


@dataclass(frozen=True)
class BadValue:
    """Stands for a value that is in the file and cannot be read."""

    reason: str


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub that is read there in parts: nothing is kept on the disk."""

    repository: str
    commit: str
    path: str
    """Inside the repository."""

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> PurePosixPath:
        return PurePosixPath(self.path).parent

    def open(self) -> BinaryIO:
        """Return it as a file. Raises one of HUB_ERRORS, as reading it does."""
        whole = f"datasets/{self.repository}@{self.commit}/{self.path}"
        file: BinaryIO = HfFileSystem().open(whole, "rb", block_size=_REQUEST_BYTES)
        return file


@contextmanager
def opened_parquet(source: Path | HubFile | bytes) -> Iterator[pq.ParquetFile]:
    """Open a parquet file, or its content. Raises pyarrow's errors or one of HUB_ERRORS."""
    if isinstance(source, HubFile):
        # Unbuffered, pyarrow would read a whole column of a row group at once.
        with source.open() as file, pq.ParquetFile(file, buffer_size=_REQUEST_BYTES) as parquet:
            yield parquet
        return
    local = pa.BufferReader(source) if isinstance(source, bytes) else source
    with pq.ParquetFile(local, memory_map=True, page_checksum_verification=True) as parquet:
        yield parquet


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file; picklable."""

    source: Path | HubFile | bytes
    """The file, or its content."""
    index: int
    num_rows: int
    first_row: int
    """Rows of the file that lie before these."""

    def read(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        """Yield the values of `column` in the rows `rows` (ascending, int64[n]), as Python's.

        A null is None, and text that is no text a `BadValue`.

        Raises:
            UserError: the file is damaged, or the hub does not give it.
        """
        try:
            with opened_parquet(self.source) as file:
                size = _batch_size(file.metadata.row_group(self.index), column)
                batches = file.iter_batches(size, row_groups=[self.index], columns=[column])
                yield from _values_at(batches, rows)
        except (HTTPError, HfHubHTTPError) as error:
            raise UserError(
                f"{self.source!s}: the hub does not give it any more: {first_reason(error)}; "
                "started again, the work continues after what is done"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.source!s}: column {column} of row group {self.index} cannot be read: "
                f"{error}; download the file again if it was damaged on its way"
            ) from error


Subsets = Mapping[str, Sequence[RowGroup]]
"""The rows of a data set: the row groups of each sub-set, by its name."""


def row_groups(source: Path | HubFile | bytes) -> list[RowGroup]:
    """Return the row groups of a file that have rows. Raises as `opened_parquet`."""
    with opened_parquet(source) as file:
        metadata = file.metadata
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return [
        RowGroup(source, index, size, sum(sizes[:index]))
        for index, size in enumerate(sizes)
        if size
    ]


def num_rows(groups: Sequence[RowGroup]) -> int:
    """Return how many rows they have together."""
    return sum(group.num_rows for group in groups)


def locate(subsets: Subsets, row: int) -> dict[str, Any]:
    """Return `subset`, `file` and `row` (from 0 in the file) of a row counted through all; JSON.

    `file` is `FOLDER/FILE`, None for rows that are in no file.
    """
    for name, groups in subsets.items():
        for group in groups:
            if row < group.num_rows:
                path = group.source
                file = None if isinstance(path, bytes) else f"{path.parent.name}/{path.name}"
                return {"subset": name, "file": file, "row": group.first_row + row}
            row -= group.num_rows
    raise AssertionError(f"row {row} is after the last one")


def describe_location(location: Mapping[str, Any]) -> str:
    """Return `ai2d/train-00000-of-00001.parquet row 7` for what `locate` returns."""
    return f"{location['file'] or location['subset']} row {location['row']}"


class Chosen(NamedTuple):
    """Some rows of one group."""

    group: RowGroup
    rows: np.ndarray
    """int64[n], ascending, from 0 in the group."""
    first: int
    """Chosen rows that lie before these."""

    def read(self, column: str) -> Iterator[Any]:
        """Yield the values of `column`; see `RowGroup.read`."""
        return self.group.read(column, self.rows)


def divide(subsets: Subsets, rows: np.ndarray, part_size: int) -> list[list[Chosen]]:
    """Return where the rows `rows` (int64[M], ascending, counted through all sub-sets) lie.

    They come in consecutive parts of `part_size` rows or a few more. The rows of a large group are
    divided: a part is what may be lost, and what is in memory.
    """
    parts: list[list[Chosen]] = [[]]
    start = done = in_part = 0
    for group in chain.from_iterable(subsets.values()):
        end = int(np.searchsorted(rows, start + group.num_rows))
        for first in range(done, end, part_size):
            if in_part >= part_size:
                parts.append([])
                in_part = 0
            some = rows[first : min(first + part_size, end)] - start
            parts[-1].append(Chosen(group, some, first))
            in_part += len(some)
        start, done = start + group.num_rows, end
    return [part for part in parts if part]


def _batch_size(group: pq.RowGroupMetaData, column: str) -> int:
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
    except UnicodeDecodeError as error:  # parquet stores any bytes as text
        return BadValue(f"text that is not UTF-8: {error.reason} at byte {error.start}")
