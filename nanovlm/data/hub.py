"""Data sets on the hub: which parquet files a sub-set has, downloaded into the hub's own cache."""

import fnmatch
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, snapshot_download
from huggingface_hub.errors import HTTPError

from nanovlm.errors import WITHOUT_HUB, UserError, did_you_mean

DEFAULT_NAME = "default"
"""The name of the only sub-set, where a data set has no sub-sets."""
CARD_FILE = "README.md"

HUB_ERRORS = (OSError, HTTPError, ValueError)
"""What the hub's client raises: no such repository or file, not reachable, not an id."""


def split_revision(path: str) -> tuple[str, str | None]:
    """Return the id and the revision of `id@revision`; None stands for the newest."""
    repository, _, revision = path.partition("@")
    return repository, revision or None


def card_folder(place: str, path: str) -> Path:
    """Return the folder of the data set's version, named by its commit, with its card.

    Args:
        path: an id, or `id@revision`.

    Raises:
        UserError: neither the hub nor its cache has the data set.
    """
    try:
        return _card_folder(path)
    except HUB_ERRORS as error:
        raise UserError(_not_given(place, path, CARD_FILE, error)) from error


@cache  # asked once a process
def _card_folder(path: str) -> Path:
    repository, revision = split_revision(path)
    return Path(
        snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=[CARD_FILE]
        )
    )


def data_files(
    place: str, path: str, folder: Path, names: Sequence[str], split: str
) -> dict[str, list[Path]]:
    """Return the parquet files of each sub-set, downloaded if they are not in the hub's cache.

    Args:
        folder: of the version to use, from `card_folder`.

    Raises:
        UserError: a sub-set is not in the card, or its files cannot be had.
    """
    patterns = {name: _patterns(place, folder / CARD_FILE, name, split) for name in names}
    wanted = sorted({pattern for listed in patterns.values() for pattern in listed})
    try:
        repository, _ = split_revision(path)
        snapshot_download(
            repository, repo_type="dataset", revision=folder.name, allow_patterns=wanted
        )
    except HUB_ERRORS as error:
        raise UserError(_not_given(place, path, ", ".join(wanted), error)) from error
    there = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.parquet"))}
    files = {
        name: [there[key] for pattern in listed for key in fnmatch.filter(there, pattern)]
        for name, listed in patterns.items()
    }
    absent = [name for name, listed in files.items() if not listed]
    if absent:
        what = ", ".join(f"{name} ({' '.join(patterns[name])})" for name in absent)
        raise UserError(
            f"{place}: the hub and its cache hold no parquet files of {what}. {WITHOUT_HUB}"
        )
    return files


def _patterns(place: str, card: Path, name: str, split: str) -> list[str]:
    """Return the paths of a sub-set's files in the repository, with wildcards, by its card."""
    configs = _configs(card)
    if not configs:  # the hub then goes by the files' names, too
        return [f"*{split}*.parquet"] if name == DEFAULT_NAME else [f"{name}/*.parquet"]
    named = {str(c.get("config_name", DEFAULT_NAME)): _files_by_split(c) for c in configs}
    if name == DEFAULT_NAME and name not in named and len(named) == 1:
        (name,) = named
    if name not in named:
        raise UserError(f"{place}: it has no sub-set {name!r}.{did_you_mean(name, named)}")
    if split not in named[name]:
        has = ", ".join(named[name]) or "none with data_files"
        raise UserError(
            f"{place}: sub-set {name!r} has no split {split!r} in its card; it has {has}"
        )
    return named[name][split]


def _configs(card: Path) -> list[Mapping[str, Any]]:
    if not card.is_file():
        return []
    return DatasetCard.load(card).data.to_dict().get("configs") or []


def _files_by_split(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the card's `data_files` as lists; a plain path or list of paths is the train split."""
    data_files = config.get("data_files") or []
    entries = data_files if isinstance(data_files, list) else [data_files]
    by_split: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (
            (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
        )
        by_split.setdefault(split, []).extend(path if isinstance(path, list) else [path])
    return by_split


def reason(error: BaseException) -> str:
    """Return the first line of what lies behind an error."""
    return str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")


def _not_given(place: str, path: str, what: str, error: BaseException) -> str:
    return (
        f"{place}: there is no folder {path}, and reading {what} of the data set {path} from the "
        f"hub failed: {reason(error)}. {WITHOUT_HUB}"
    )
