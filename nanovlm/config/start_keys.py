"""What is known of the model to start from without a look at its files.

A published model is on disk or on the hub, where `training/start.py` reads its numbers, which takes
torch and time. Here is decided whether that is needed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import VLM_KEYS, Layer, get_value

KNOWN_EOS: Mapping[str, int] = MappingProxyType(
    {
        "builtin:digits": 0,
        "builtin:digits-tiles": 3,
        VLMConfig().lm_tokenizer: 0,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 2,
        "HuggingFaceTB/SmolLM2-360M-Instruct": 2,
    }
)
"""The token that ends a text, of tokenizers whose files need not be read for it."""

_NO_NUMBERS = {
    *("vlm.vit_model_type", "vlm.vit_dropout", "vlm.vit_cls_flag"),
    *("vlm.lm_model_type", "vlm.lm_dropout", "vlm.lm_attn_scaling", "vlm.lm_max_length"),
    *("vlm.lm_use_tokens", "vlm.lm_eos_token_id", "vlm.lm_chat_template"),
}
BACKBONE_NUMBERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(key for key in VLM_KEYS if key.startswith(prefixes) and key not in _NO_NUMBERS)
        for name, prefixes in (
            ("vlm.vit_model_type", ("vlm.vit_", "vlm.image_")),
            ("vlm.lm_model_type", ("vlm.lm_",)),
        )
    }
)
"""By the key that names a backbone: the keys whose values its files give."""


def value_of(given: Mapping[str, Any], key: str) -> Any:
    """Return the value that a configuration of the given values has for `key`, unchecked."""
    return given.get(key, get_value(TrainConfig(), key))


def unread_backbones(given: Mapping[str, Any]) -> list[str]:
    """Return the keys of the backbones whose files have to be read for their numbers.

    Those whose weights are to be loaded, that are not the default ones, and of whose numbers some
    are not given.
    """
    if value_of(given, "vlm.vlm_load_backbone_weights") is not True:
        return []
    return [
        name
        for name, numbers in BACKBONE_NUMBERS.items()
        if value_of(given, name) != get_value(TrainConfig(), name) and not {*numbers} <= {*given}
    ]


def needs_files(given: Mapping[str, Any]) -> bool:
    """Return whether the configuration depends on files of the model to start from."""
    return (
        value_of(given, "resume_from_vlm_checkpoint") is True
        or str(value_of(given, "vlm.lm_tokenizer")) not in KNOWN_EOS
        or bool(unread_backbones(given))
    )


def eos_layers(name: str, eos: int | None) -> list[Layer]:
    """Return the EOS of the tokenizer `name` as a layer, if it is not the default one."""
    if eos is None or eos == VLMConfig().lm_eos_token_id:
        return []
    return [Layer(f"vlm.lm_tokenizer={name!r}", {"vlm": {"lm_eos_token_id": eos}})]


def known_eos_layers(given: Mapping[str, Any]) -> list[Layer]:
    """Return the EOS of a known tokenizer as a layer, if no setting gives it."""
    name = str(value_of(given, "vlm.lm_tokenizer"))
    return [] if "vlm.lm_eos_token_id" in given else eos_layers(name, KNOWN_EOS.get(name))
