"""A saved model as the start of a training run."""

import dataclasses
import json
from typing import Any

from nanovlm.config import VLMConfig
from nanovlm.errors import UserError
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
"""Fields of VLMConfig that do not change what the weights compute, or what they are shown."""


def load_checkpoint(model: VisionLanguageModel, folder: str) -> None:
    """Copy the weights that `save_pretrained` wrote to `folder` into `model`, in place.

    Raises:
        UserError: the folder holds no model, or one of another architecture than `model`.
    """
    saved = VisionLanguageModel.from_pretrained(folder)
    theirs, ours = _architecture(saved.config), _architecture(model.config)
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        raise UserError(
            *(
                f"vlm.{name}={ours[name]} does not fit the model in {folder}: "
                f"set vlm.{name}={json.dumps(theirs[name], separators=(',', ':'))}"
                for name in differing
            )
        )
    model.load_state_dict(saved.state_dict())


def _architecture(config: VLMConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    return {name: value for name, value in values.items() if name not in _FREE_TO_DIFFER}
