"""What a folder with `config.json` and safetensors holds, whoever wrote it: JSON, and tensors."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovlm.errors import UserError
from nanovlm.files import check_whole

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_PATTERNS = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")

_MAX_LISTED = 10

Shape = Sequence[int]


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


def check_tensors(location: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
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
        f"{location}: does not fit {CONFIG_FILE}; tensors {problem}: {_listed(names)}"
        for problem, names in problems.items()
        if names
    ]
    if messages:
        raise UserError(*messages)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
