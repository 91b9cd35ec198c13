"""What a run starts from, a saved model or pretrained backbones: its weights and its architecture.

So `vlm.lm_model_type=HuggingFaceTB/SmolLM2-360M-Instruct` is enough: its numbers, its tokenizer and
the token that ends a text need not be set.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.generations import GENERATIONS, TILED_KEYS
from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer, given_values
from nanovlm.config.start_keys import eos_layers, unread_backbones, value_of
from nanovlm.data.tokenizer import load_tokenizer
from nanovlm.downloads import find_folder
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.models.checkpoint import MODEL_FILES, read_config
from nanovlm.models.model_files import CONFIG_FILE
from nanovlm.models.pretrained_config import (
    DECODER_FILES,
    TOKENIZER_FILE,
    decoder_layer,
    vision_layer,
)
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.tokenizer_files import eos_token_id

_FREE_TO_DIFFER = {
    "vit_dropout",
    "vit_model_type",
    "lm_dropout",
    "lm_max_length",
    "lm_model_type",
    "lm_tokenizer",
    "lm_eos_token_id",
    *TILED_KEYS,
    "vlm_load_backbone_weights",
    "vlm_checkpoint_path",
    "hf_repo_name",
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

    `name` is a folder or a hub id. Where `lm_max_length` includes the image, it is taken too: its
    default is the length of a text. So are the chat template and the tiles of generation 8k.

    Raises UserError if there is no such model.
    """
    folder = find_folder("vlm.vlm_checkpoint_path", name, MODEL_FILES)
    config = read_config(folder, {})
    text: dict[str, Any] = {
        "lm_tokenizer": config.lm_tokenizer,
        "lm_eos_token_id": config.lm_eos_token_id,
    }
    if config.traits.length_includes_image:
        text["lm_max_length"] = config.lm_max_length
    if config.traits.is_tiled:
        text |= {key: getattr(config, key) for key in TILED_KEYS}
    return Layer(str(folder / CONFIG_FILE), {"vlm": architecture(config) | text})


def architecture(config: VLMConfig) -> dict[str, Any]:
    """Return the values of `config` that a saved model's weights go with."""
    values = dataclasses.asdict(config) | {"vit_inter_dim": config.vit_mlp_dim}
    return {name: value for name, value in values.items() if name not in _FREE_TO_DIFFER}


BACKBONES: Mapping[str, Callable[[str, str], Layer]] = {
    "vlm.vit_model_type": vision_layer,
    "vlm.lm_model_type": decoder_layer,
}


def start_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return what goes under `layers`: the numbers of the model that they say to start from.

    That is the saved model, if they resume from one, or else each backbone whose weights are to be
    loaded and whose numbers are neither the defaults nor given, with the decoder's own tokenizer;
    and the EOS of another tokenizer than the default one. Otherwise no file is read and the hub is
    not asked.

    Raises:
        UserError: a file is missing, or is of a model that cannot be loaded.
    """
    given = given_values(layers)
    if value_of(given, "resume_from_vlm_checkpoint") is True:
        return [checkpoint_layer(str(value_of(given, "vlm.vlm_checkpoint_path")))]
    found = _backbone_layers(given)
    given = given_values(found) | given
    if "vlm.lm_eos_token_id" in given:
        return found
    tokenizer = str(value_of(given, "vlm.lm_tokenizer"))
    return [*found, *eos_layers(tokenizer, eos_token_id(tokenizer))]


def _backbone_layers(given: Mapping[str, Any]) -> list[Layer]:
    found: list[Layer] = []
    problems = ErrorCollector()
    for key in unread_backbones(given):
        with problems:
            layer = BACKBONES[key](key, str(value_of(given, key)))
            found.append(_with_extra_tokens(layer, given))
    problems.raise_if_any()
    return found


def _with_extra_tokens(layer: Layer, given: Mapping[str, Any]) -> Layer:
    """Add to the vocabulary of a decoder what the generation adds to its tokenizer's."""
    vocab_size = layer.values["vlm"].get("lm_vocab_size")
    generation = GENERATIONS.get(str(value_of(given, "vlm.generation")))
    if generation is None or not isinstance(vocab_size, int):  # which is told later
        return layer
    extended = vocab_size + len(generation.extra_tokens)
    return Layer(layer.source, {"vlm": layer.values["vlm"] | {"lm_vocab_size": extended}})


MAX_OTHER_TOKENS = 0.1
"""Share of the ids that may stand for other tokens: fine-tunes rename some special ones, while two
tokenizers that were trained apart agree on next to nothing."""

_KNOWN_PAIR = (VLMConfig().lm_model_type, VLMConfig().lm_tokenizer)


def check_decoder_tokenizer(vlm: VLMConfig) -> None:
    """Raise UserError if `lm_tokenizer` numbers its tokens otherwise than the decoder's own one.

    No file is read for the default pair, nor where both have the same name.
    """
    pair = (vlm.lm_model_type, vlm.lm_tokenizer)
    if pair == _KNOWN_PAIR or vlm.lm_model_type == vlm.lm_tokenizer:
        return
    folder = find_folder("vlm.lm_model_type", vlm.lm_model_type, DECODER_FILES)
    if not (folder / TOKENIZER_FILE).is_file():
        return  # it comes with none
    theirs = _tokens_by_id(str(folder))
    ours = _tokens_by_id(vlm.lm_tokenizer)
    common = ours.keys() & theirs.keys()
    others = sorted(number for number in common if ours[number] != theirs[number])
    if len(others) <= MAX_OTHER_TOKENS * len(common):
        return
    first = others[0]
    raise UserError(
        f"vlm.lm_tokenizer={vlm.lm_tokenizer!r} is not the tokenizer that "
        f"vlm.lm_model_type={vlm.lm_model_type!r} was trained with: {len(others)} of {len(common)} "
        f"ids stand for other tokens, {first} for {ours[first]!r} instead of {theirs[first]!r}; "
        f"leave it out, or set vlm.lm_tokenizer={vlm.lm_model_type}"
    )


def _tokens_by_id(name: str) -> dict[int, str]:
    vocabulary = load_tokenizer(name).get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocabulary.items()}
