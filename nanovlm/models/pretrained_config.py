"""The numbers in the config.json of a published encoder or decoder: as a layer of a configuration,
and held against a VLMConfig."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.models.model_files import CONFIG_FILE, read_json_object

# Theirs, ours, and the value that a config.json without the key means (published ones of SigLIP
# leave out what is transformers' default).
_VISION_NUMBERS = (
    ("hidden_size", "vit_hidden_dim", 768),
    ("intermediate_size", "vit_inter_dim", 3072),
    ("num_hidden_layers", "vit_n_blocks", 12),
    ("num_attention_heads", "vit_n_heads", 12),
    ("layer_norm_eps", "vit_ln_eps", 1e-6),
    ("patch_size", "vit_patch_size", 16),
    ("image_size", "vit_img_size", 224),
)
_DECODER_NUMBERS = (
    ("hidden_size", "lm_hidden_dim", 4096),
    ("intermediate_size", "lm_inter_dim", 11008),
    ("num_hidden_layers", "lm_n_blocks", 32),
    ("num_attention_heads", "lm_n_heads", 32),
    ("rms_norm_eps", "lm_rms_eps", 1e-6),
    ("tie_word_embeddings", "lm_tie_weights", False),
)
TOKENIZER_FILE = "tokenizer.json"
DECODER_FILES = (CONFIG_FILE, TOKENIZER_FILE, "tokenizer_config.json")
"""What says how a decoder is built and which text its ids stand for."""
PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
VISION_FILES = (CONFIG_FILE, PROCESSOR_FILE, PREPROCESSOR_FILE)
"""What says how an encoder is built and how its images were prepared."""
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as transformers stores them."""
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_VOCAB_SIZE = 32_000
_DEFAULT_MAX_POSITIONS = 2048


def vision_layer(place: str, name: str) -> Layer:
    """Return the numbers of the SigLIP `name`, a folder or a hub id that the setting `place` holds.

    Raises UserError if its config.json cannot be had, or is no SigLIP's.
    """
    folder = find_folder(place, name, VISION_FILES)
    path = folder / CONFIG_FILE
    values = _vision_values(path)
    _raise_if_any(_unsupported_vision(path, values))
    numbers = {f: _get(values, k, d) for k, f, d in _VISION_NUMBERS}
    return Layer(str(path), {"vlm": numbers | _image_values(folder)})


def _image_values(folder: Path) -> dict[str, Any]:
    """Return how the encoder's images were resized and normalised, as far as its files say so."""
    values = _image_processor(folder)
    found = {key: values[key] for key in ("image_mean", "image_std") if values.get(key)}
    if values.get("do_normalize") is False:
        found |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    resample = values.get("resample")
    if resample is not None:  # another one stands here as it is, and is refused if nobody sets ours
        found["image_resampling"] = _RESAMPLING.get(resample, f"resample={resample}")
    return found


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """Return what the files say of images; the newer layout goes first, as in transformers 5."""
    if (folder / PROCESSOR_FILE).is_file():
        nested = read_json_object(folder / PROCESSOR_FILE).get("image_processor")
        if isinstance(nested, dict):  # an older file of this name says nothing of images
            return nested
    file = folder / PREPROCESSOR_FILE
    return read_json_object(file) if file.is_file() or file.is_symlink() else {}


def decoder_layer(place: str, name: str) -> Layer:
    """Return the numbers of the Llama `name`, a folder or a hub id that the setting `place` holds.

    If it comes with a tokenizer of its own, that is named too.

    Raises UserError if its config.json cannot be had, or is no Llama's.
    """
    folder = find_folder(place, name, DECODER_FILES)
    path = folder / CONFIG_FILE
    values = read_json_object(path)
    _raise_if_any(_unsupported_decoder(path, values))
    numbers = {field: _get(values, key, default) for key, field, default in _DECODER_NUMBERS} | {
        "lm_n_kv_heads": _kv_heads(values),
        "lm_re_base": _theta(values),
        "lm_vocab_size": _get(values, "vocab_size", _DEFAULT_VOCAB_SIZE),
        "lm_max_position_embeddings": _get(
            values, "max_position_embeddings", _DEFAULT_MAX_POSITIONS
        ),
    }
    if (folder / TOKENIZER_FILE).is_file():
        numbers["lm_tokenizer"] = name
    return Layer(str(path), {"vlm": numbers})


def check_vision_config(path: Path, config: VLMConfig) -> None:
    """Raise UserError with all that is not as in `config`, or is no SigLIP."""
    values = _vision_values(path)
    problems = _unsupported_vision(path, values)
    for key, field, default in _VISION_NUMBERS:
        ours = config.vit_mlp_dim if field == "vit_inter_dim" else getattr(config, field)
        problems += _differing(path, key, _get(values, key, default), field, ours)
    _raise_if_any(problems)


def check_decoder_config(path: Path, config: VLMConfig) -> int:
    """Return the size of the file's vocabulary, which may be smaller than that of `config`.

    Raises UserError with all that is not as in `config`, or is no Llama.
    """
    values = read_json_object(path)
    problems = [
        *_unsupported_decoder(path, values),
        *_differing(
            path, "num_key_value_heads", _kv_heads(values), "lm_n_kv_heads", config.lm_n_kv_heads
        ),
        *_differing(path, "rope_theta", _theta(values), "lm_re_base", config.lm_re_base),
    ]
    for key, field, default in _DECODER_NUMBERS:
        problems += _differing(path, key, _get(values, key, default), field, getattr(config, field))
    vocab_size = _get(values, "vocab_size", _DEFAULT_VOCAB_SIZE)
    if not isinstance(vocab_size, int) or vocab_size > config.lm_vocab_size:
        problems.append(
            f"vlm.lm_vocab_size={config.lm_vocab_size} is smaller than vocab_size={vocab_size!r} "
            f"in {path}: set vlm.lm_vocab_size to {vocab_size!r} or more"
        )
    if not problems:  # only then is ours what it must be
        head_dim = config.lm_hidden_dim // config.lm_n_heads
        problems += _unsupported(path, values, "head_dim", head_dim)
    _raise_if_any(problems)
    assert isinstance(vocab_size, int), "else there is a problem"
    return vocab_size


def _vision_values(path: Path) -> Mapping[str, Any]:
    values = read_json_object(path)
    both_towers = "vision_config" in values
    return values["vision_config"] or {} if both_towers else values


def _unsupported_vision(path: Path, values: Mapping[str, Any]) -> list[str]:
    return [
        *_unsupported(path, values, "model_type", "siglip_vision_model"),
        *_unsupported(path, values, "hidden_act", "gelu_pytorch_tanh"),
        *_unsupported(path, values, "num_channels", 3),
    ]


def _unsupported_decoder(path: Path, values: Mapping[str, Any]) -> list[str]:
    rope = _rope(values)
    return [
        *_unsupported(path, values, "model_type", "llama"),
        *_unsupported(path, values, "hidden_act", "silu"),
        *_unsupported(path, rope, "rope_type", "default"),
        *_unsupported(path, rope, "type", "default"),  # its older name
    ]


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values.get("rope_parameters") or values.get("rope_scaling") or {}  # new, old layout


def _theta(values: Mapping[str, Any]) -> Any:
    old = _get(values, "rope_theta", _DEFAULT_ROPE_THETA)
    return _get(_rope(values), "rope_theta", old)


def _kv_heads(values: Mapping[str, Any]) -> Any:
    return _get(values, "num_key_value_heads", _get(values, "num_attention_heads", 32))


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        raise UserError(*problems)


def _get(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value


def _unsupported(path: Path, values: Mapping[str, Any], key: str, expected: Any) -> list[str]:
    value = _get(values, key, expected)
    if value == expected:
        return []
    return [f"{path}: {key}={value!r} cannot be loaded, only {expected!r}"]


def _differing(path: Path, key: str, theirs: Any, field: str, ours: Any) -> list[str]:
    if theirs == ours:
        return []
    return [f"vlm.{field}={ours!r}, but {path} has {key}={theirs!r}: set vlm.{field}={theirs!r}"]
