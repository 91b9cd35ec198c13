"""Models on disk: `config.json` and `model.safetensors`, with the names of nanoVLM v0.1.

The only file of models/ that reads or writes files.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Size, Tensor, nn

from nanovlm.config import VLMConfig
from nanovlm.config_files import Layer, build_config
from nanovlm.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_HEAD = "decoder.head.weight"
_EMBEDDING = "decoder.token_embedding.weight"
_MAX_LISTED = 10


def write_model(folder: Path, config: VLMConfig, model: nn.Module) -> None:
    """Write both files; a reader finds the old ones or the new ones, never a part of one.

    A tied head is stored once, as `decoder.head.weight`.
    """
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    folder.mkdir(parents=True, exist_ok=True)
    temporary_config = folder / f".{CONFIG_FILE}.tmp"
    temporary_weights = folder / f".{WEIGHTS_FILE}.tmp"
    temporary_config.write_text(json.dumps(values, indent=4) + "\n")
    save_model(model, str(temporary_weights), metadata={"format": "pt"})
    temporary_config.replace(folder / CONFIG_FILE)
    temporary_weights.replace(folder / WEIGHTS_FILE)


def read_config(folder: Path, overrides: Mapping[str, Any]) -> VLMConfig:
    """Read the configuration; `overrides` go before the file.

    Raises:
        UserError: files are missing, the JSON is no object, or a key or value is not VLMConfig's.
    """
    _require_files(folder)
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object, got {type(values).__name__}")
    layers = Layer(str(path), {"vlm": values}), Layer("arguments", {"vlm": overrides})
    return build_config(*layers).vlm


def read_weights(folder: Path, shapes: Mapping[str, Size], tied: bool) -> dict[str, Tensor]:
    """Read float32 tensors of exactly these names and shapes.

    Args:
        shapes: what the model holds, by name.
        tied: the two names of a tied head stand for one tensor; the file may hold either or both.

    Raises:
        UserError: the file cannot be read, or tensors are missing, unknown or of other shapes.
    """
    _require_files(folder)
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error
    if tied:
        shared = stored.get(_HEAD, stored.get(_EMBEDDING))
        if shared is not None:
            stored |= {_HEAD: shared, _EMBEDDING: shared}
    missing = [name for name in shapes if name not in stored]
    unknown = [name for name in stored if name not in shapes]
    misshaped = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": misshaped}
    messages = [
        f"{path}: does not fit {CONFIG_FILE}; tensors {problem}: {_listed(names)}"
        for problem, names in problems.items()
        if names
    ]
    if messages:
        raise UserError(*messages)
    # Copied out of the mapped file: memory aligned as any other gives results equal to the bit.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}


def load_backbone_weights(model: nn.Module) -> None:
    """Put the pretrained weights of the ViT and the decoder into `model`.

    Raises:
        UserError: always; this version does not read the hub.
    """
    raise UserError(
        "vlm.vlm_load_backbone_weights=true: this version cannot load pretrained weights from the "
        "hub; vlm.vlm_load_backbone_weights=false trains from random weights"
    )


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to load a model from")
    absent = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if absent:
        raise UserError(*(f"{folder}: holds no {name}, which a saved model has" for name in absent))


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
