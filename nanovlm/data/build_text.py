"""The text of chosen rows as token ids, part by part; what is there already is not made again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanovlm.data.cache import PreparedFolder
from nanovlm.data.rows import Chosen, in_parts
from nanovlm.files import replacing

ROWS_PER_PART = 8192
_SAMPLES_AT_ONCE = 100_000


class RowText(NamedTuple):
    """The samples of one row."""

    tokens: list[list[int]]
    """Of each sample: prompt, and in training answer and EOS."""
    prompt_lengths: list[int]
    num_turns: int
    num_over_long: int = 0
    num_incomplete: int = 0
    """Turns without a question or without an answer."""
    problem: str | None = None
    """Why the row cannot be read; then it has no samples."""


EncodeRows = Callable[[Sequence[Any]], list[RowText]]
"""From the values of the text column to the samples of each row."""


class EncodedText(NamedTuple):
    """N samples of M rows, in the order of the rows."""

    tokens: np.ndarray
    """int32[all tokens], one sample behind the other."""
    lengths: np.ndarray
    """int32[N]"""
    prompt_lengths: np.ndarray
    """int32[N]"""
    rows: np.ndarray
    """int64[N], the row of each sample, counted through the chosen rows."""
    counts: np.ndarray
    """int64[M, 3], turns, over-long and incomplete ones of each row."""
    bad_rows: np.ndarray
    """int64[K], the rows that cannot be read, counted through the chosen rows."""
    reasons: np.ndarray
    """str[K], why not."""


def encode_part(part: Sequence[Chosen], column: str, encode: EncodeRows) -> EncodedText:
    """Return the samples of consecutive groups' rows."""
    values = [value for chosen in part for value in chosen.group.read(column, chosen.rows)]
    encoded = encode(values)
    samples = [sample for row in encoded for sample in row.tokens]
    per_row = [len(row.tokens) for row in encoded]
    problems = [(i, row.problem) for i, row in enumerate(encoded) if row.problem is not None]
    return EncodedText(
        tokens=np.fromiter((token for sample in samples for token in sample), np.int32),
        lengths=np.fromiter(map(len, samples), np.int32),
        prompt_lengths=np.fromiter((n for row in encoded for n in row.prompt_lengths), np.int32),
        rows=np.repeat(part[0].first + np.arange(len(encoded)), per_row),
        counts=np.array(
            [(row.num_turns, row.num_over_long, row.num_incomplete) for row in encoded],
            np.int64,
        ).reshape(-1, 3),
        bad_rows=part[0].first + np.array([i for i, _ in problems], np.int64),
        reasons=np.array([reason for _, reason in problems], np.str_),
    )


def encode_text(
    chosen: Sequence[Chosen],
    column: str,
    encode: EncodeRows,
    folder: Path,
    on_rows: Callable[[int], None],
) -> list[Path]:
    """Encode all chosen rows; return a file for each part, for `read_text`.

    Args:
        folder: where the parts are kept.
        on_rows: called with the number of rows done so far.
    """
    files, done = [], 0
    for number, part in enumerate(in_parts(chosen, ROWS_PER_PART)):
        file = folder / f"text-{number:05}.npz"
        if not file.exists():
            with replacing(file) as part_file, part_file.open("wb") as stream:
                np.savez(stream, **encode_part(part, column, encode)._asdict())
        files.append(file)
        done += sum(len(group.rows) for group in part)
        on_rows(done)
    return files


def read_text(files: Sequence[Path]) -> EncodedText:
    """Return what `encode_text` has written, all parts as one."""
    parts = []
    for file in files:
        with np.load(file) as arrays:
            parts.append(EncodedText(**arrays))
    return EncodedText(*map(np.concatenate, zip(*parts, strict=True)))


def write_samples(folder: PreparedFolder, text: EncodedText, samples: np.ndarray) -> None:
    """Write the arrays `tokens`, `offsets` and `prompt_lengths` of these samples in this order."""
    starts = np.cumsum(text.lengths, dtype=np.int64) - text.lengths
    offsets = np.zeros(len(samples) + 1, np.int64)
    np.cumsum(text.lengths[samples], out=offsets[1:])
    tokens = np.empty(offsets[-1], np.int32)
    for first in range(0, len(samples), _SAMPLES_AT_ONCE):  # an index of all tokens is 8 bytes each
        some = samples[first : first + _SAMPLES_AT_ONCE]
        lengths = text.lengths[some]
        begin, end = offsets[first], offsets[first + len(some)]
        shift = starts[some] - offsets[first : first + len(some)]
        tokens[begin:end] = text.tokens[np.repeat(shift, lengths) + np.arange(begin, end)]
    folder.write_array("tokens", tokens)
    folder.write_array("offsets", offsets)
    folder.write_array("prompt_lengths", text.prompt_lengths[samples].astype(np.int64))
