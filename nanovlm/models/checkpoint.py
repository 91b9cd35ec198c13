"""Our models on disk: `config.json` and `model.safetensors`, with the names of nanoVLM v0.1."""

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
from nanovlm.models.model_files import CONFIG_FILE, WEIGHTS_FILE, check_tensors, read_json_object

_HEAD = "decoder.head.weight"
_EMBEDDING = "decoder.token_embedding.weight"

PUBLISHED_IMAGES: dict[str, Any] = {
    "image_mean": (0.0, 0.0, 0.0),
    "image_std": (1.0, 1.0, 1.0),
    "image_resampling": "bilinear",
}
"""What nanoVLM v0.1 does to images (its data/processors.py): squashed by torchvision's default
filter, values from 0 to 1. Its files have no keys for it, and it reads no file with other keys."""


def write_model(folder: Path, config: VLMConfig, model: nn.Module) -> None:
    """Write both files; a reader finds the old ones or the new ones, never a part of one.

    A tied head is stored once, as `decoder.head.weight`. What is said of images is left out where
    it is PUBLISHED_IMAGES: nanoVLM v0.1 reads the model then, and must not read any other.
    """
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    if PUBLISHED_IMAGES.items() <= values.items():
        values = {key: value for key, value in values.items() if key not in PUBLISHED_IMAGES}
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
    values = PUBLISHED_IMAGES | read_json_object(path)
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
    check_tensors(str(path), shapes, {name: tensor.shape for name, tensor in stored.items()})
    # Copied out of the mapped file: memory aligned as any other gives results equal to the bit.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to load a model from")
    absent = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if absent:
        raise UserError(*(f"{folder}: holds no {name}, which a saved model has" for name in absent))
