"""Our models on disk: `config.json` and `model.safetensors`, as nanoVLM has them.

Names of tensors are the same in all its generations, keys of `config.json` are not.
"""

import dataclasses
import json
from collections.abc import Container, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from nanovlm.config.generations import (
    DERIVED_KEYS,
    GENERATIONS,
    OWN_KEYS,
    PUBLISHED_IMAGES,
    check_file_keys,
    generation_of,
)
from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer, build_config, preset_layer
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.files import check_whole, replacing
from nanovlm.models.model_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensors,
    read_json_object,
    read_tensors,
    tensor_shapes,
)
from nanovlm.tokenizer_files import eos_token_id, setting

MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""What a saved model consists of."""

_HEAD = "decoder.head.weight"
_EMBEDDING = "decoder.token_embedding.weight"

_ADDED_LATER = frozenset().union(*(g.added_keys for g in GENERATIONS.values()))
_FIELDS = frozenset(field.name for field in dataclasses.fields(VLMConfig))


def write_model(folder: Path, config: VLMConfig, model: nn.Module) -> None:
    """Write both files; a reader finds the old ones or the new ones, never a part of one.

    A tied head is stored once, as `decoder.head.weight`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as config_part:
        config_part.write_text(json.dumps(file_values(config), indent=4) + "\n")
        with replacing(folder / WEIGHTS_FILE) as weights_part:
            save_model(model, str(weights_part), metadata={"format": "pt"})


def file_values(config: VLMConfig) -> dict[str, Any]:
    """Return the content of config.json: the keys that nanoVLM of this generation knows.

    It refuses files with others. So the image keys are left out where they equal PUBLISHED_IMAGES:
    then nanoVLM can read the model, and it must read no other.
    """
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    values |= {key: getattr(config, key) for key in DERIVED_KEYS}
    left_out = OWN_KEYS | (_ADDED_LATER - config.traits.added_keys)
    if not PUBLISHED_IMAGES.items() <= values.items():
        left_out -= PUBLISHED_IMAGES.keys()
    if config.traits.takes_eos_from_tokenizer:
        left_out |= {"lm_eos_token_id"}
    return {key: value for key, value in values.items() if key not in left_out}


def read_config(folder: Path, overrides: Mapping[str, Any]) -> VLMConfig:
    """Read the configuration; `overrides` win over the file.

    What the file leaves out is as in the preset of its generation.

    Raises:
        UserError: files are missing, the JSON is no object, the model is of a generation that
            cannot be loaded, or a key or value is not VLMConfig's; or the generation takes EOS
            from the tokenizer, and its files are missing or name none.
    """
    _require_files(folder)
    path = folder / CONFIG_FILE
    values = read_json_object(path)
    generation = generation_of(str(path), values)
    known = (_FIELDS - {"generation"}) | DERIVED_KEYS.keys()
    problems = ErrorCollector()
    with problems:
        check_file_keys(str(path), generation, values, known)
    values = {key: value for key, value in values.items() if key in known}
    layers = [
        preset_layer(generation.preset),
        Layer(str(path), {"vlm": {**PUBLISHED_IMAGES, **values, "generation": generation.name}}),
        Layer("arguments", {"vlm": overrides}),
    ]
    config = VLMConfig()
    with problems:
        config = build_config(*layers).vlm
    problems.raise_if_any()
    if generation.takes_eos_from_tokenizer and "lm_eos_token_id" not in overrides:
        # Above the file, where nanoVLM v0.2 writes a 0 that it never reads.
        return build_config(*layers, _eos_layer(config.lm_tokenizer)).vlm
    return config


def _eos_layer(tokenizer: str) -> Layer:
    eos = eos_token_id(tokenizer)
    if eos is None:
        raise UserError(
            f"{setting(tokenizer)}: its tokenizer_config.json must name an eos_token, since the "
            "model's config.json does not"
        )
    return Layer(setting(tokenizer), {"vlm": {"lm_eos_token_id": eos}})


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
