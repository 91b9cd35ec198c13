"""Where the rows of the training data and of the benchmark lie.

A path is `builtin:digits`, in training also `builtin:digits-tiles`, a folder of parquet files, or
the id of a data set on the hub, where
`id@revision` means one version of it. A folder is laid out as the hub's own downloads of
the_cauldron, FineVision and MMStar are:

    training     FOLDER/NAME/*.parquet for each name; FOLDER/*.parquet for the name `default`
    benchmark    FOLDER/*.parquet

Of the hub only the parquet files of the wanted sub-sets are downloaded, into the hub's own cache.
"""

import fnmatch
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import sanitize_patterns
from huggingface_hub import DatasetCard

from nanovlm.config.schema import TrainConfig
from nanovlm.data.digits import BUILTIN_DIGITS, digits_benchmark_rows, digits_training_rows
from nanovlm.data.digits_tiles import BUILTIN_DIGITS_TILES, digits_tiles_training_rows
from nanovlm.data.rows import HubFile, Subsets, opened_parquet, row_groups
from nanovlm.downloads import HUB_ERRORS, download, hub_files, split_revision
from nanovlm.errors import WITHOUT_HUB, ErrorCollector, UserError, did_you_mean
from nanovlm.files import check_whole, find_local_folder, fingerprint

DEFAULT_NAME = "default"
"""The name of the only sub-set, where a data set has no sub-sets."""
CARD_FILE = "README.md"

_INTEGER = (pa.types.is_integer, pa.types.is_null)  # null: a column of nothing but None
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
_STORED_IMAGE = {"bytes": _BYTES, "path": _TEXT}
Columns = Mapping[str, tuple[str, Any]]
"""By name: the type in words, and as tests of which one holds, {field: type} or [element type]."""
_TRAINING_COLUMNS: Columns = {
    "images": ("a list of {bytes, path}", [_STORED_IMAGE]),
    "texts": ("a list of {user, assistant}", [{"user": _TEXT, "assistant": _TEXT}]),
}
_BENCHMARK_COLUMNS: Columns = {
    "index": ("an integer", _INTEGER),
    "image": ("{bytes, path}", _STORED_IMAGE),
    **{name: ("a string", _TEXT) for name in ("question", "answer", "category", "l2_category")},
}

Builtin = Mapping[str, Callable[[], datasets.Dataset]]
"""What ships with the program, by the path that names it."""
_BUILTIN_TRAINING: Builtin = {
    BUILTIN_DIGITS: digits_training_rows,
    BUILTIN_DIGITS_TILES: digits_tiles_training_rows,
}
_BUILTIN_BENCHMARKS: Builtin = {BUILTIN_DIGITS: digits_benchmark_rows}

Files = Mapping[str, Sequence[Path | HubFile]]
"""The parquet files of each sub-set."""

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\b.*")


@dataclass(frozen=True)
class Source:
    """Rows that can be read."""

    identity: Mapping[str, Any]
    """What tells these rows from others, and from another version of themselves; JSON."""
    load: Callable[[], Subsets]
    """Finds the files, downloads them if need be, and checks their columns."""


def training_source(
    path: str,
    names: tuple[str, ...],
    min_ratings: Mapping[str, int] | None = None,
    *,
    stream: bool = False,
) -> Source:
    """Return the source of all sub-sets `names`.

    Columns: `images`, a list of images, and `texts`, a list of turns {user, assistant}; for each
    kind in `min_ratings` also `KIND_ratings`, a list of an integer for each turn. Others stay
    unread.

    Args:
        stream: reads files of the hub where they lie, instead of downloading them first.

    Raises:
        UserError: a sub-set does not exist, here or on the hub. `load` raises it if files
            are missing, cannot be read or have other columns.
    """
    if path in _BUILTIN_TRAINING and names != (DEFAULT_NAME,):
        raise UserError(
            f"train_dataset_name={list(names)}: {path} has no sub-sets, "
            f"so this must be [{DEFAULT_NAME}]"
        )
    rated = {f"{kind}_ratings": ("a list of integers", [_INTEGER]) for kind in min_ratings or {}}
    if path in _BUILTIN_TRAINING and rated:
        settings = ", ".join(f"{kind}_min_rating={n}" for kind, n in (min_ratings or {}).items())
        raise UserError(f"{settings}: {path} has no ratings, so this must be 1")
    setting = f"train_dataset_path={path!r}"
    columns = {**_TRAINING_COLUMNS, **rated}
    return _source(setting, path, names, "train", columns, _BUILTIN_TRAINING, stream)


def benchmark_source(path: str) -> Source:
    """Return the source of the benchmark, in MMStar's columns. Raises as `training_source`."""
    setting, names = f"test_dataset_path={path!r}", (DEFAULT_NAME,)
    return _source(setting, path, names, "val", _BENCHMARK_COLUMNS, _BUILTIN_BENCHMARKS)


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
        more_benchmarks=tuple(_pinned("more_benchmarks", path) for path in config.more_benchmarks),
    )


def _pinned(key: str, path: str) -> str:
    setting = f"{key}={path!r}"
    if path in {**_BUILTIN_TRAINING, **_BUILTIN_BENCHMARKS} or find_local_folder(setting, path):
        return path
    return f"{split_revision(path)[0]}@{_card_folder(setting, path).name}"


def _source(
    setting: str,
    path: str,
    names: tuple[str, ...],
    split: str,
    columns: Columns,
    builtin: Builtin,
    stream: bool = False,
) -> Source:
    if path in builtin:
        return Source({"builtin": path}, lambda: _in_memory(builtin[path]()))
    folder = find_local_folder(setting, path)
    if folder is not None:
        files = _files_of_folder(setting, folder, names)
        return Source({"files": _state(folder, files)}, lambda: _subsets(setting, files, columns))
    cached = _card_folder(setting, path)
    repository, _ = split_revision(path)
    return Source(
        {"hub": repository, "commit": cached.name, "names": list(names), "split": split},
        lambda: _subsets(
            setting, _files_of_hub(setting, path, cached, names, split, stream), columns
        ),
    )


def _in_memory(rows: datasets.Dataset) -> Subsets:
    content = io.BytesIO()  # not by `to_parquet`, which shows a bar
    pq.write_table(rows.with_format("arrow")[:], content)
    return {DEFAULT_NAME: row_groups(content.getvalue())}


def _files_of_folder(
    setting: str, path: Path, names: Sequence[str]
) -> Mapping[str, Sequence[Path]]:
    problems = ErrorCollector()
    result: dict[str, list[Path]] = {}
    for name in names:
        folder = path if name == DEFAULT_NAME else path / name
        with problems:
            if not folder.is_dir():
                known = (entry.name for entry in path.iterdir() if entry.is_dir())
                raise UserError(
                    f"{setting}, train_dataset_name {name!r}: there is no folder {folder}."
                    f"{did_you_mean(name, known)}"
                )
            result[name] = sorted(folder.glob("*.parquet"))
            if not result[name]:
                raise UserError(f"{setting}: there is no *.parquet file in {folder}")
            check_whole(setting, *result[name])
    problems.raise_if_any()
    return result


def _state(folder: Path, files: Mapping[str, Sequence[Path]]) -> list[Any]:
    """Return what tells local files from others: other bytes show in size, time or fingerprint."""

    def state(file: Path) -> list[Any]:
        stat = file.stat()
        name = str(file.relative_to(folder))
        return [name, stat.st_size, stat.st_mtime_ns, fingerprint(file)]

    return [[name, [*map(state, listed)]] for name, listed in files.items()]


def _card_folder(setting: str, path: str) -> Path:
    """Return the folder of the data set's version, named by its commit, with its card."""
    repository, revision = split_revision(path)
    return download(setting, repository, (CARD_FILE,), revision, "dataset")


def _files_of_hub(
    setting: str, path: str, folder: Path, names: Sequence[str], split: str, stream: bool
) -> Files:
    """Return the parquet files of each sub-set, downloaded if they are not in the hub's cache, or
    to be streamed.

    Args:
        folder: of the version to use, from `_card_folder`.

    Raises:
        UserError: a sub-set is not in the card, or its files are missing.
    """
    patterns = {name: _patterns(setting, folder / CARD_FILE, name, split) for name in names}
    repository, _ = split_revision(path)
    there: dict[str, Path | HubFile]
    if stream:
        found = sorted(hub_files(setting, repository, folder.name))
        there = {key: HubFile(repository, folder.name, key) for key in found}
    else:
        wanted = tuple(sorted({pattern for listed in patterns.values() for pattern in listed}))
        download(setting, repository, wanted, folder.name, "dataset")
        there = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.parquet"))}
    files = {
        name: [there[key] for pattern in listed for key in fnmatch.filter(there, pattern)]
        for name, listed in patterns.items()
    }
    absent = [f"{name} ({' '.join(patterns[name])})" for name in names if not files[name]]
    if absent:
        raise UserError(
            f"{setting}: the hub and its cache hold no parquet files of {', '.join(absent)}. "
            f"{WITHOUT_HUB}"
        )
    return files


def _patterns(setting: str, card: Path, name: str, split: str) -> list[str]:
    """Return the paths of a sub-set's files in the repository, with wildcards, by its card."""
    content = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    configs = content.get("configs")
    if not configs:  # the hub then goes by the files' names, too
        return [f"*{split}*.parquet"] if name == DEFAULT_NAME else [f"{name}/*.parquet"]
    try:
        named = {
            str(config.get("config_name", DEFAULT_NAME)): sanitize_patterns(
                config.get("data_files") or {}
            )
            for config in configs
        }
    except ValueError as error:
        raise UserError(f"{setting}: its card cannot be read: {error}") from error
    if name == DEFAULT_NAME and name not in named and len(named) == 1:
        (name,) = named
    if name not in named:
        raise UserError(f"{setting}: it has no sub-set {name!r}.{did_you_mean(name, named)}")
    if split not in named[name]:
        has = ", ".join(named[name]) or "none with data_files"
        raise UserError(
            f"{setting}: sub-set {name!r} has no split {split!r} in its card; it has {has}"
        )
    return named[name][split]


def _subsets(setting: str, files: Files, columns: Columns) -> Subsets:
    """Return the rows of the files. Raises UserError with all that is wrong with these."""
    problems = ErrorCollector()
    with problems:
        _check_all_different(setting, files)
    for listed in files.values():
        with problems:
            _check_all_shards(setting, listed)
        for file in listed:
            with problems:
                _check_columns(setting, file, columns)
    problems.raise_if_any()
    return {
        name: [group for file in listed for group in row_groups(file)]
        for name, listed in files.items()
    }


def _check_all_different(setting: str, files: Files) -> None:
    """Raise UserError if a file would be read more than once, under whatever names."""
    read: dict[Path | HubFile, tuple[str, Path | HubFile]] = {}
    for name, listed in files.items():
        for file in listed:
            real = file.resolve() if isinstance(file, Path) else file
            if real in read:
                first, path = read[real]
                also = f", which is {file}" if file != path else ""
                raise UserError(
                    f"{setting}, train_dataset_name: {first!r} and {name!r} read the same file, so "
                    f"its rows would count twice: {path}{also}"
                )
            read[real] = name, file


def _check_all_shards(setting: str, files: Sequence[Path | HubFile]) -> None:
    """Raise UserError if files named `x-00001-of-00043` are fewer than they say."""
    shards = [(match[1], int(match[2])) for file in files if (match := _SHARD.match(file.name))]
    for stem, number in set(shards):
        found = shards.count((stem, number))
        if found != number:
            raise UserError(
                f"{setting}: {files[0].parent} has {found} of the {number} files {stem}-*-of-*"
            )


def _check_columns(setting: str, file: Path | HubFile, columns: Columns) -> None:
    if isinstance(file, Path):
        check_whole(setting, file)
    try:
        with opened_parquet(file) as parquet:
            schema = parquet.schema_arrow
    except (*HUB_ERRORS, pa.ArrowException) as error:
        raise UserError(f"{setting}: {file} is not a parquet file: {error}") from error
    wrong = [
        f"{name} must be {words}, " + ("is missing" if index < 0 else f"is {schema[index].type}")
        for name, (words, wanted) in columns.items()
        if (index := schema.get_field_index(name)) < 0 or not _fits(schema[index].type, wanted)
    ]
    if wrong:
        has = ", ".join(schema.names)
        raise UserError(f"{setting}: {file} has the columns {has}; {'; '.join(wrong)}")


def _fits(kind: pa.DataType, wanted: Any) -> bool:
    if isinstance(wanted, list):
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return is_list and _fits(kind.value_type, wanted[0])
    if isinstance(wanted, dict):
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        return all(name in fields and _fits(fields[name], t) for name, t in wanted.items())
    return any(holds(kind) for holds in wanted)
