"""Where the rows of the training data and of the benchmark lie.

A path is `builtin:digits`, a folder of parquet files, or the id of a data set on the hub, where
`id@revision` means one version of it. A folder is laid out as the hub's own downloads of
the_cauldron, FineVision and MMStar are:

    training     FOLDER/NAME/*.parquet for each name; FOLDER/*.parquet for the name `default`
    benchmark    FOLDER/*.parquet

Of the hub only the parquet files of the wanted sub-sets are downloaded.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanovlm.config.schema import TrainConfig
from nanovlm.data.digits import BUILTIN_DIGITS, digits_benchmark_rows, digits_training_rows
from nanovlm.data.hub import DEFAULT_NAME, card_folder, data_files, split_revision
from nanovlm.data.rows import Subset, TableGroup, parquet_groups
from nanovlm.errors import ErrorCollector, UserError, did_you_mean
from nanovlm.files import check_whole, find_local_folder, fingerprint

_STORED_IMAGE = {"bytes": pa.binary(), "path": pa.string()}
_TRAINING_COLUMNS = {
    "images": ("a list of {bytes, path}", [_STORED_IMAGE]),
    "texts": ("a list of {user, assistant}", [{"user": pa.string(), "assistant": pa.string()}]),
}
_BENCHMARK_COLUMNS = {
    "index": ("an integer", pa.int64()),
    "question": ("a string", pa.string()),
    "image": ("{bytes, path}", _STORED_IMAGE),
    "answer": ("a string", pa.string()),
    "category": ("a string", pa.string()),
    "l2_category": ("a string", pa.string()),
}
Columns = Mapping[str, tuple[str, Any]]
"""By name: the type in words, and as pyarrow's type, {field: type} or [type of the elements]."""

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\b.*")


@dataclass(frozen=True)
class Source:
    """Rows that can be read."""

    identity: Mapping[str, Any]
    """What tells these rows from others, and from another version of themselves; JSON."""
    load: Callable[[], tuple[Subset, ...]]
    """Finds the files, downloads them if need be, and checks their columns."""


def training_source(path: str, names: tuple[str, ...]) -> Source:
    """Return the source of all sub-sets `names`.

    Columns: `images`, a list of images, and `texts`, a list of turns {user, assistant}; others,
    such as FineVision's ratings, stay unread.

    Raises:
        UserError: a sub-set does not exist or the hub does not give it. `load` raises it if files
            are missing, cannot be read or have other columns.
    """
    if path == BUILTIN_DIGITS:
        if names != (DEFAULT_NAME,):
            raise UserError(
                f"train_dataset_name={list(names)}: {BUILTIN_DIGITS} has no sub-sets, "
                f"so this must be [{DEFAULT_NAME}]"
            )
        return _builtin(lambda: digits_training_rows().with_format("arrow")[:])
    place = f"train_dataset_path={path!r}"
    folder = find_local_folder(place, path)
    if folder is None:
        return _hub(place, path, names, "train", _TRAINING_COLUMNS)
    problems = ErrorCollector()
    files: dict[str, list[Path]] = {}
    for name in names:
        with problems:
            files[name] = _files_of_folder(place, folder, name)
    problems.raise_if_any()
    return _folder(place, folder, files, _TRAINING_COLUMNS)


def benchmark_source(path: str) -> Source:
    """Return the source of the benchmark, in MMStar's columns. Raises as `training_source`."""
    if path == BUILTIN_DIGITS:
        return _builtin(lambda: digits_benchmark_rows().with_format("arrow")[:])
    place = f"test_dataset_path={path!r}"
    folder = find_local_folder(place, path)
    if folder is None:
        return _hub(place, path, (DEFAULT_NAME,), "val", _BENCHMARK_COLUMNS)
    files = {DEFAULT_NAME: _files_of_folder(place, folder, DEFAULT_NAME)}
    return _folder(place, folder, files, _BENCHMARK_COLUMNS)


def pin_data(config: TrainConfig) -> TrainConfig:
    """Return `config` with the versions that its data sets on the hub have now.

    So all workers of a search, and whoever runs its best configuration again, read the same rows.

    Raises:
        UserError: the hub does not give a data set.
    """
    return replace(
        config,
        train_dataset_path=_pinned("train_dataset_path", config.train_dataset_path),
        test_dataset_path=_pinned("test_dataset_path", config.test_dataset_path),
    )


def _pinned(key: str, path: str) -> str:
    place = f"{key}={path!r}"
    if path == BUILTIN_DIGITS or find_local_folder(place, path):
        return path
    repository, _ = split_revision(path)
    return f"{repository}@{card_folder(place, path).name}"


def _builtin(make_table: Callable[[], pa.Table]) -> Source:
    identity = {"builtin": BUILTIN_DIGITS}
    return Source(identity, lambda: (Subset(DEFAULT_NAME, (TableGroup(make_table()),)),))


def _files_of_folder(place: str, path: Path, name: str) -> list[Path]:
    folder = path if name == DEFAULT_NAME else path / name
    if not folder.is_dir():
        known = (entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(
            f"{place}, train_dataset_name {name!r}: there is no folder {folder}."
            f"{did_you_mean(name, known)}"
        )
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{place}: there is no *.parquet file in {folder}")
    check_whole(place, *files)
    return files


def _folder(place: str, path: Path, files: Mapping[str, list[Path]], columns: Columns) -> Source:
    """Return the source of local files; other bytes in them show in time, size or fingerprint."""
    identity = {
        "files": [
            [name, [[str(file.relative_to(path)), *_state_of(file)] for file in listed]]
            for name, listed in files.items()
        ]
    }
    return Source(identity, lambda: _subsets(place, files, columns))


def _state_of(file: Path) -> tuple[int, int, str]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, fingerprint(file)


def _hub(place: str, path: str, names: tuple[str, ...], split: str, columns: Columns) -> Source:
    folder = card_folder(place, path)
    repository, _ = split_revision(path)
    identity = {"hub": repository, "commit": folder.name, "names": list(names), "split": split}
    return Source(
        identity,
        lambda: _subsets(place, data_files(place, path, folder, names, split), columns),
    )


def _subsets(place: str, files: Mapping[str, list[Path]], columns: Columns) -> tuple[Subset, ...]:
    problems = ErrorCollector()
    with problems:
        _check_all_different(place, files)
    for listed in files.values():
        with problems:
            _check_all_shards(place, listed)
        for file in listed:
            with problems:
                _check_columns(place, file, columns)
    problems.raise_if_any()
    return tuple(
        Subset(name, tuple(group for file in listed for group in parquet_groups(file)))
        for name, listed in files.items()
    )


def _check_all_different(place: str, files: Mapping[str, list[Path]]) -> None:
    """Raise UserError if a file would be read more than once, under whatever names."""
    names: dict[Path, list[tuple[str, Path]]] = {}
    for name, listed in files.items():
        for file in listed:
            names.setdefault(file.resolve(), []).append((name, file))
    for same in names.values():
        if len(same) > 1:
            (first, path), (second, other), *_ = same
            also = f", which is {other}" if other != path else ""
            raise UserError(
                f"{place}, train_dataset_name: {first!r} and {second!r} read the same file, so its "
                f"rows would count twice: {path}{also}"
            )


def _check_all_shards(place: str, files: Sequence[Path]) -> None:
    """Raise UserError if files named `x-00001-of-00043` are fewer than they say."""
    shards = [match for file in files if (match := _SHARD.match(file.name))]
    for stem, number in {(match[1], int(match[2])) for match in shards}:
        found = sum((match[1], int(match[2])) == (stem, number) for match in shards)
        if found != number:
            raise UserError(
                f"{place}: {files[0].parent} has {found} of the {number} files {stem}-*-of-*"
            )


def _check_columns(place: str, file: Path, columns: Columns) -> None:
    check_whole(place, file)
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{place}: {file} is not a parquet file: {error}") from error
    wrong = [
        f"{name} must be {words}, " + ("is missing" if index < 0 else f"is {schema[index].type}")
        for name, (words, wanted) in columns.items()
        if (index := schema.get_field_index(name)) < 0 or not _fits(schema[index].type, wanted)
    ]
    if wrong:
        has = ", ".join(schema.names)
        raise UserError(f"{place}: {file} has the columns {has}; {'; '.join(wrong)}")


def _fits(kind: pa.DataType, wanted: Any) -> bool:
    if isinstance(wanted, list):
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return is_list and _fits(kind.value_type, wanted[0])
    if isinstance(wanted, dict):
        if not pa.types.is_struct(kind):
            return False
        fields = {field.name: field.type for field in kind}
        return all(name in fields and _fits(fields[name], t) for name, t in wanted.items())
    return _family(kind) in (_family(wanted), "null")  # null: a column of nothing but None


def _family(kind: pa.DataType) -> str:
    families: Iterable[tuple[str, Callable[[pa.DataType], bool]]] = (
        ("string", lambda k: pa.types.is_string(k) or pa.types.is_large_string(k)),
        ("binary", lambda k: pa.types.is_binary(k) or pa.types.is_large_binary(k)),
        ("integer", pa.types.is_integer),
    )
    return next((name for name, holds in families if holds(kind)), str(kind))
