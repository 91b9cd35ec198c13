"""Folders with `config.json` and safetensors, on disk or fetched from the hub.

What a model file needs to be read, whoever wrote it: finding it, its JSON, the shapes of its
tensors, and what is wrong with them.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovlm.errors import WITHOUT_HUB, UserError
from nanovlm.files import check_whole, find_local_folder, user_path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_PATTERNS = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")

_MAX_LISTED = 10

Shape = Sequence[int]


def find_folder(
    place: str, name: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """Return the folder `name`, or the one where the hub's repository `name` lies after download.

    Args:
        place: the setting that holds `name`, for the message.
        patterns: the files to download; nothing else is.
        revision: a branch, tag or commit of the repository; None means its main branch.

    Raises:
        UserError: there is no such folder, and the hub does not give it.
    """
    folder = find_local_folder(f"{place}={name!r}", name)
    if folder is not None:
        return folder
    try:
        return _downloaded(name, patterns, revision)
    except (OSError, HTTPError, ValueError) as error:  # no such repository; no network; no id
        repository = name if revision is None else f"{name} at revision {revision}"
        raise UserError(
            f"{place}={name!r}: there is no folder {name}, and {', '.join(patterns)} of the "
            f"repository {repository} came neither from the hub nor from its cache: "
            f"{first_reason(error)}. {WITHOUT_HUB}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Return whether `find_folder` would ask the hub for `name`, which is of its form."""
    return not user_path(name).is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def first_reason(error: BaseException) -> str:
    """Return in one line what lies behind an error of the hub's client."""
    # What the hub answers is told by the error itself, what the network did by its cause.
    told = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    lines = (line.strip() for line in str(told).splitlines())
    line = next((x for x in lines if x and "Client Error." not in x), type(told).__name__)
    return line.rstrip(".")


@cache  # the hub is asked once: later trials of a worker start from the same bytes, and at once
def _downloaded(name: str, patterns: tuple[str, ...], revision: str | None) -> Path:
    # Not file by file: hf_hub_download repeats its requests for 23 s where there is no network.
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    if not any(path for pattern in patterns for path in folder.glob(pattern)):
        # Without network a part of the repository in the cache counts as the repository.
        raise FileNotFoundError(f"{folder} holds none of these files")
    return folder


def forget_downloads() -> None:
    """Ask the hub again from now on: a repository has changed."""
    _downloaded.cache_clear()


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises UserError if it does not."""
    check_whole(str(path.parent), path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: holds no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object, got {type(values).__name__}")
    return values


WeightFiles = Mapping[Path, frozenset[str] | None]
"""Files, and the names of the tensors that are read from each; None reads all of it."""


def weight_files(folder: Path) -> WeightFiles:
    """Return the folder's `model.safetensors`, or else the shards that its index names.

    Of a shard only those tensors are read that the index gives to it: others in it are stale.

    Raises:
        UserError: neither is there, the index is broken, or shards are missing.
    """
    check_whole(str(folder), folder / WEIGHTS_FILE, folder / INDEX_FILE)
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: weight_map must map tensors to files, got {shards!r}")
    elsewhere = [s for s in shards.values() if not isinstance(s, str) or Path(s).name != s]
    if elsewhere:
        raise UserError(f"{index}: weight_map must name files beside it, got {elsewhere[0]!r}")
    check_whole(str(folder), *(folder / shard for shard in sorted(set(shards.values()))))
    absent = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
    if absent:
        raise UserError(f"{folder}: holds no {', '.join(absent)}, which {INDEX_FILE} names")
    return {
        folder / shard: frozenset(name for name, of in shards.items() if of == shard)
        for shard in sorted(set(shards.values()))
    }


def tensor_shapes(files: WeightFiles) -> dict[str, list[int]]:
    """Return the shape of every tensor, by name.

    Raises UserError if a file is no safetensors, or lacks a tensor that is to be read from it.
    """
    shapes: dict[str, list[int]] = {}
    for path, wanted in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                missing = sorted((wanted or frozenset()) - names)
                if missing:
                    raise UserError(
                        f"{path}: holds no {_listed(missing)}, which {INDEX_FILE} says is in it"
                    )
                names = names if wanted is None else names & wanted
                shapes |= {name: file.get_slice(name).get_shape() for name in sorted(names)}
        except SafetensorError as error:
            raise UserError(f"{path}: is not a safetensors file: {error}") from error
    return shapes


def read_tensors(files: WeightFiles, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of these names, on the CPU; one at a time is read."""
    for path, wanted in files.items():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in names and (wanted is None or name in wanted):
                    yield name, file.get_tensor(name)


def check_tensors(place: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise UserError with all names that only one side has, and all shapes that differ."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshaped = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": misshaped}
    messages = [
        f"{place}: does not fit {CONFIG_FILE}; tensors {problem}: {_listed(names)}"
        for problem, names in problems.items()
        if names
    ]
    if messages:
        raise UserError(*messages)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
