"""Our models on disk: `config.json` and `model.safetensors`, with the names of nanoVLM v0.1."""

import dataclasses
import json
from collections.abc import Container, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer, build_config
from nanovlm.errors import UserError
from nanovlm.files import check_whole, replacing
from nanovlm.models.model_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensors,
    read_json_object,
    read_tensors,
    tensor_shapes,
)

MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""What a saved model consists of."""

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

    A tied head is stored once, as `decoder.head.weight`. The image keys are left out where
    they equal PUBLISHED_IMAGES: then nanoVLM v0.1 can read the model, and it must read no other.
    """
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    if PUBLISHED_IMAGES.items() <= values.items():
        values = {key: value for key, value in values.items() if key not in PUBLISHED_IMAGES}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as config_part:
        config_part.write_text(json.dumps(values, indent=4) + "\n")
        with replacing(folder / WEIGHTS_FILE) as weights_part:
            save_model(model, str(weights_part), metadata={"format": "pt"})


def read_config(folder: Path, overrides: Mapping[str, Any]) -> VLMConfig:
    """Read the configuration; `overrides` win over the file.

    Raises:
        UserError: files are missing, the JSON is no object, or a key or value is not VLMConfig's.
    """
    _require_files(folder)
    path = folder / CONFIG_FILE
    values = PUBLISHED_IMAGES | read_json_object(path)
    layers = Layer(str(path), {"vlm": values}), Layer("arguments", {"vlm": overrides})
    return build_config(*layers).vlm


@torch.no_grad()
def read_weights(folder: Path, model: nn.Module, tied: bool) -> None:
    """Copy the folder's tensors of any type into `model`, in place, one at a time.

    Args:
        tied: the head is the token embedding; the file may hold it under either name, or both.

    Raises:
        UserError: the file cannot be read, or tensors are missing, unknown or of other shapes;
            nothing has been copied.
    """
    _require_files(folder)
    path = folder / WEIGHTS_FILE
    targets = model.state_dict()
    stored = tensor_shapes({path: None})
    expected = {name: target.shape for name, target in targets.items()}
    if tied and (_HEAD in stored or _EMBEDDING in stored):  # one of both names is enough
        for name in {_HEAD, _EMBEDDING} - stored.keys():
            del expected[name]
    check_tensors(str(path), expected, stored)
    if tied and _HEAD in stored and _EMBEDDING in stored:
        both = dict(read_tensors({path: None}, {_HEAD, _EMBEDDING}))
        if not torch.equal(both[_HEAD], both[_EMBEDDING]):
            raise UserError(f"{path}: lm_tie_weights=true, but {_HEAD} is not {_EMBEDDING}")
    for name, tensor in read_tensors({path: None}, stored):
        targets[name].copy_(tensor)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to load a model from")
    check_whole(str(folder), *(folder / name for name in MODEL_FILES))
    absent = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if absent:
        raise UserError(*(f"{folder}: holds no {name}, which a saved model has" for name in absent))


class Snapshot:
    """Copies of the tensors of some parts of a model, on its device; nothing is shared with it."""

    def __init__(self, model: nn.Module, parts: Container[str]) -> None:
        """Copy what `model` holds now.

        Args:
            parts: names of submodules of `model`.
        """
        self._tensors = {
            name: tensor.detach().clone()
            for name, tensor in _tensors(model)
            if name.split(".")[0] in parts
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copy the tensors back, in place, to `model` or another one of the same architecture."""
        for name, tensor in _tensors(model):
            if name in self._tensors:
                tensor.copy_(self._tensors[name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Not the state dict: it would hold a tied head a second time.
    return chain(model.named_parameters(), model.named_buffers())
