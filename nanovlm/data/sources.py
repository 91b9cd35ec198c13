"""Rows of the training data and of the benchmark, wherever they lie.

A path is `builtin:digits`, a folder of parquet files, or the id of a data set on the hub. A folder
is laid out as the hub's own downloads of the_cauldron and MMStar are:

    training     FOLDER/NAME/*.parquet for each name; FOLDER/*.parquet for the name `default`
    benchmark    FOLDER/*.parquet
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from nanovlm.data.digits import (
    BENCHMARK_FEATURES,
    BUILTIN_DIGITS,
    TRAINING_FEATURES,
    digits_benchmark_rows,
    digits_training_rows,
)
from nanovlm.errors import WITHOUT_HUB, UserError, did_you_mean

DEFAULT_NAME = "default"
"""The name of the only sub-set, where a data set has no sub-sets."""
CARD_FILE = "README.md"

# What comes from the hub or a file fails with these: nothing there, not reachable, no such
# sub-set, not a parquet file.
READ_ERRORS = (OSError, HTTPError, ValueError, datasets.exceptions.DatasetsError)


def load_training_rows(path: str, names: tuple[str, ...]) -> datasets.Dataset:
    """Return the training rows of all sub-sets `names`, one after the other.

    Columns: `images`, a list of images, and `texts`, a list of {user, assistant, source}.

    Raises:
        UserError: a sub-set does not exist, cannot be reached or read, or has other columns.
    """
    if path == BUILTIN_DIGITS:
        if names != (DEFAULT_NAME,):
            raise UserError(
                f"train_dataset_name={list(names)}: {BUILTIN_DIGITS} has no sub-sets, "
                f"so this must be [{DEFAULT_NAME}]"
            )
        return digits_training_rows()
    parts = [_load_subset(path, name) for name in names]
    return datasets.concatenate_datasets(parts)


def load_benchmark_rows(path: str) -> datasets.Dataset:
    """Return the rows of the benchmark, in MMStar's columns.

    Raises:
        UserError: it does not exist, cannot be reached or read, or has other columns.
    """
    if path == BUILTIN_DIGITS:
        return digits_benchmark_rows()
    place = f"test_dataset_path={path!r}"
    if _is_folder(path):
        return _read_folder(place, Path(path), BENCHMARK_FEATURES)
    return _read_hub(place, path, None, "val", BENCHMARK_FEATURES)


def _load_subset(path: str, name: str) -> datasets.Dataset:
    place = f"train_dataset_path={path!r}, train_dataset_name {name!r}"
    if not _is_folder(path):
        return _read_hub(place, path, name, "train", TRAINING_FEATURES)
    folder = Path(path) if name == DEFAULT_NAME else Path(path, name)
    if not folder.is_dir():
        known = (entry.name for entry in Path(path).iterdir() if entry.is_dir())
        raise UserError(f"{place}: there is no folder {folder}.{did_you_mean(name, known)}")
    return _read_folder(place, folder, TRAINING_FEATURES)


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _read_folder(place: str, folder: Path, features: datasets.Features) -> datasets.Dataset:
    """Return the parquet files of a folder, by name; other columns than `features` stay unread."""
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{place}: there is no *.parquet file in {folder}")
    try:
        return datasets.Dataset.from_parquet(files, columns=list(features), features=features)
    except READ_ERRORS as error:
        raise UserError(
            f"{place}: the files of {folder} are not parquet with the columns "
            f"{', '.join(features)} ({reason(error)})"
        ) from error


def _read_hub(
    place: str, path: str, name: str | None, split: str, features: datasets.Features
) -> datasets.Dataset:
    try:
        _fetch_card(path)
        rows = datasets.load_dataset(path, name, split=split)
    except READ_ERRORS as error:
        raise UserError(
            f"{place}: there is no folder {path}, and reading it from the hub (split {split}) "
            f"failed: {reason(error)}. {WITHOUT_HUB}"
        ) from error
    return _select_columns(place, rows, list(features))


@cache
def _fetch_card(path: str) -> None:
    # Fails at once where there is neither network nor cache, where load_dataset would repeat its
    # requests for 23 s. It starts with this file too, so what is in the cache comes with it.
    snapshot_download(path, repo_type="dataset", allow_patterns=[CARD_FILE])


def _select_columns(place: str, rows: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{place}: columns {', '.join(columns)} are needed, {', '.join(missing)} are missing; "
            f"there are {', '.join(rows.column_names)}"
        )
    return rows.select_columns(list(columns))


def reason(error: BaseException) -> str:
    """Return the first line of what lies behind an error."""
    return str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
