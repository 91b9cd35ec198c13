"""A saved model as the start of a training run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nanovlm.config import VLMConfig
from nanovlm.config_files import Layer
from nanovlm.errors import UserError
from nanovlm.models.checkpoint import MODEL_FILES, read_config
from nanovlm.models.model_files import CONFIG_FILE, find_folder
from nanovlm.models.vision_language_model import VisionLanguageModel

_FREE_TO_DIFFER = {
    "vit_dropout",
    "vit_model_type",
    "lm_dropout",
    "lm_max_length",
    "lm_model_type",
    "lm_tokenizer",
    "lm_eos_token_id",
    "vlm_load_backbone_weights",
    "vlm_checkpoint_path",
}
"""Fields of VLMConfig that may be set otherwise than a saved model has them. The tokenizer is one:
the same may go by the name of a folder or of a repository."""


def load_checkpoint(model: VisionLanguageModel, name: str) -> None:
    """Copy the weights of a saved model into `model`, in place.

    Args:
        name: a folder that `save_pretrained` wrote, or a repository of the hub that holds one.

    Raises:
        UserError: there is no such model, or it has another architecture than `model`.
    """
    model.load_weights(find_checkpoint(name, model.config))


def find_checkpoint(name: str, config: VLMConfig) -> Path:
    """Return the folder of a saved model that has the architecture of `config`.

    Args:
        name: the folder itself, or a repository of the hub, which is downloaded.

    Raises:
        UserError: there is no such model, or it has another architecture.
    """
    folder = find_folder("vlm.vlm_checkpoint_path", name, MODEL_FILES)
    theirs, ours = architecture(read_config(folder, {})), architecture(config)
    differing = [key for key in ours if theirs[key] != ours[key]]
    if differing:
        raise UserError(
            *(
                f"vlm.{key}={ours[key]} does not fit the model in {name}: "
                f"set vlm.{key}={json.dumps(theirs[key], separators=(',', ':'))}"
                for key in differing
            )
        )
    return folder


def checkpoint_layer(name: str) -> Layer:
    """Return a saved model's architecture, tokenizer and EOS as values of a configuration.

    `name` is a folder or a hub id.

    Raises UserError if there is no such model.
    """
    folder = find_folder("vlm.vlm_checkpoint_path", name, MODEL_FILES)
    config = read_config(folder, {})
    text = {"lm_tokenizer": config.lm_tokenizer, "lm_eos_token_id": config.lm_eos_token_id}
    return Layer(str(folder / CONFIG_FILE), {"vlm": architecture(config) | text})


def architecture(config: VLMConfig) -> dict[str, Any]:
    """Return the values of `config` that a saved model's weights go with."""
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    return {name: value for name, value in values.items() if name not in _FREE_TO_DIFFER}
