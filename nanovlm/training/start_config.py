"""The architecture of what a run starts from, as layers of its configuration.

So `vlm.lm_model_type=HuggingFaceTB/SmolLM2-360M-Instruct` is enough: its numbers, its tokenizer and
the token that ends a text need not be set.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovlm.config import TrainConfig
from nanovlm.config_files import TOKENIZERS_WITH_DEFAULT_EOS, Layer, get_value, given_values
from nanovlm.data.processors import eos_token_id
from nanovlm.errors import Problems
from nanovlm.models.pretrained_config import decoder_layer, vision_layer
from nanovlm.training.checkpoint import checkpoint_layer

BACKBONES: Mapping[str, Callable[[str, str], Layer]] = {
    "vlm.vit_model_type": vision_layer,
    "vlm.lm_model_type": decoder_layer,
}


def start_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return what goes under `layers`: the numbers of the model that they say to start from.

    That is the saved model, if they resume from one, or else each backbone whose weights are to be
    loaded and whose numbers are not the defaults, with the decoder's own tokenizer; and the EOS of
    another tokenizer than the default one. Nobody is asked for anything otherwise.

    Raises:
        UserError: a file cannot be had, or is of a model that cannot be loaded.
    """
    given = given_values(layers)
    if _value(given, "resume_from_vlm_checkpoint") is True:
        return [checkpoint_layer(str(_value(given, "vlm.vlm_checkpoint_path")))]
    found = _backbone_layers(given)
    return [*found, *_eos_layers(given_values(found) | given)]


def _backbone_layers(given: Mapping[str, Any]) -> list[Layer]:
    if _value(given, "vlm.vlm_load_backbone_weights") is not True:
        return []
    found: list[Layer] = []
    problems = Problems()
    for key, read_layer in BACKBONES.items():
        if (name := _value(given, key)) != get_value(TrainConfig(), key):
            with problems:
                found.append(read_layer(key, str(name)))
    problems.raise_if_any()
    return found


def _eos_layers(given: Mapping[str, Any]) -> list[Layer]:
    """Return the EOS that the tokenizer's files name, if nothing else says what it is."""
    name = _value(given, "vlm.lm_tokenizer")
    if "vlm.lm_eos_token_id" in given or name in TOKENIZERS_WITH_DEFAULT_EOS:
        return []
    eos = eos_token_id(str(name))
    place = f"vlm.lm_tokenizer={name!r}"
    return [] if eos is None else [Layer(place, {"vlm": {"lm_eos_token_id": eos}})]


def _value(given: Mapping[str, Any], key: str) -> Any:
    return given.get(key, get_value(TrainConfig(), key))
