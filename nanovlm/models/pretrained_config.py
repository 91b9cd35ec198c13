"""The numbers in the config.json of a published encoder or decoder: as a layer of a configuration,
and compared with a VLMConfig.

Read here and not by transformers, whose classes raise on files that they cannot use themselves and
name no setting, and take seconds to import.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
_DECODER_LIMITS = (
    ("vocab_size", "lm_vocab_size", 32_000),
    ("max_position_embeddings", "lm_max_position_embeddings", 2048),
)
"""Numbers that a model may have other values of than the file."""
TOKENIZER_FILE = "tokenizer.json"
DECODER_FILES = (CONFIG_FILE, TOKENIZER_FILE, "tokenizer_config.json")
"""Architecture and tokenizer of a decoder."""
PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
VISION_FILES = (CONFIG_FILE, PROCESSOR_FILE, PREPROCESSOR_FILE)
"""Architecture of an encoder, and how its images were prepared."""
_GELU_TANH = "gelu_pytorch_tanh"
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as transformers stores them."""


class _Published(NamedTuple):
    """The content of a config.json."""

    path: Path
    values: Mapping[str, Any]
    numbers: Mapping[str, tuple[str, Any]]
    """Of each field of VLMConfig that must be equal: the file's key and value."""
    unsupported: list[str]
    """Why it cannot be loaded into any model of ours."""

    def layer(self, **more: Any) -> Layer:
        """Return the numbers as a layer. Raises UserError if the file cannot be loaded."""
        _raise_if_any(self.unsupported)
        values = {field: value for field, (_, value) in self.numbers.items()}
        return Layer(str(self.path), {"vlm": values | more})

    def problems(self, config: VLMConfig) -> list[str]:
        """Return all that is not as in `config`, or cannot be loaded."""
        ours = {name: getattr(config, name) for name in self.numbers}
        if "vit_inter_dim" in ours:
            ours["vit_inter_dim"] = config.vit_mlp_dim
        return self.unsupported + [
            f"vlm.{name}={ours[name]!r}, but {self.path} has {key}={theirs!r}: "
            f"set vlm.{name}={theirs!r}"
            for name, (key, theirs) in self.numbers.items()
            if theirs != ours[name]
        ]


def vision_layer(setting: str, name: str) -> Layer:
    """Return the numbers of the SigLIP `name`, a folder or a hub id that `setting` holds.

    Raises UserError if its config.json is missing, or is no SigLIP's.
    """
    folder = find_folder(setting, name, VISION_FILES)
    return _read_vision(folder / CONFIG_FILE).layer(**_image_values(folder))


def decoder_layer(setting: str, name: str) -> Layer:
    """Return the numbers of the Llama `name`, a folder or a hub id that `setting` holds.

    If it comes with a tokenizer of its own, that is named too.

    Raises UserError if its config.json is missing, or is no Llama's.
    """
    folder = find_folder(setting, name, DECODER_FILES)
    published = _read_decoder(folder / CONFIG_FILE)
    more = {field: _get(published.values, key, value) for key, field, value in _DECODER_LIMITS}
    if (folder / TOKENIZER_FILE).is_file():
        more["lm_tokenizer"] = name
    return published.layer(**more)


def check_vision_config(path: Path, config: VLMConfig) -> None:
    """Raise UserError with all that is not as in `config`, or is no SigLIP."""
    _raise_if_any(_read_vision(path).problems(config))


def check_decoder_config(path: Path, config: VLMConfig) -> int:
    """Return the size of the file's vocabulary, which may be smaller than that of `config`.

    Raises UserError with all that is not as in `config`, or is no Llama.
    """
    published = _read_decoder(path)
    problems = published.problems(config)
    vocab_size = _get(published.values, "vocab_size", 32_000)
    if not isinstance(vocab_size, int) or vocab_size > config.lm_base_vocab_size:
        needed = (
            vocab_size + config.extra_token_amount if isinstance(vocab_size, int) else vocab_size
        )
        problems.append(
            f"vlm.lm_vocab_size={config.lm_vocab_size}{config.traits.less_extra_tokens} is smaller "
            f"than vocab_size={vocab_size!r} in {path}: set vlm.lm_vocab_size to {needed!r} or more"
        )
    if not problems:  # only then is ours what it must be
        head_dim = config.lm_hidden_dim // config.lm_n_heads
        problems = _unsupported(path, published.values, head_dim=head_dim)
    _raise_if_any(problems)
    assert isinstance(vocab_size, int), "else there is a problem"
    return vocab_size


def _read_vision(path: Path) -> _Published:
    values = read_json_object(path)
    if "vision_config" in values:  # of both towers
        values = values["vision_config"] or {}
    numbers = {field: (key, _get(values, key, value)) for key, field, value in _VISION_NUMBERS}
    unsupported = _unsupported(
        path,
        values,
        model_type="siglip_vision_model",
        hidden_act="gelu_pytorch_tanh",
        num_channels=3,
    )
    return _Published(path, values, numbers, unsupported)


def _read_decoder(path: Path) -> _Published:
    values = read_json_object(path)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # new, old layout
    numbers = {field: (key, _get(values, key, value)) for key, field, value in _DECODER_NUMBERS}
    kv_heads = _get(values, "num_key_value_heads", numbers["lm_n_heads"][1])
    numbers["lm_n_kv_heads"] = ("num_key_value_heads", kv_heads)
    theta = _get(rope, "rope_theta", _get(values, "rope_theta", 10_000.0))
    numbers["lm_re_base"] = ("rope_theta", theta)
    unsupported = _unsupported(path, values, model_type="llama", hidden_act="silu")
    unsupported += _unsupported(path, rope, rope_type="default", type="default")  # new, old name
    return _Published(path, values, numbers, unsupported)


def _image_values(folder: Path) -> dict[str, Any]:
    """Return how the encoder's images were resized and normalised, as far as its files say so."""
    values = _image_processor(folder)
    found = {key: values[key] for key in ("image_mean", "image_std") if values.get(key)}
    if values.get("do_normalize") is False:
        found |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    resample = values.get("resample")
    if resample is not None:  # an unknown one is refused later, unless a setting replaces it
        found["image_resampling"] = _RESAMPLING.get(resample, f"resample={resample}")
    return found


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """Return what the files say of images; the newer layout goes first, as in transformers 5."""
    if (folder / PROCESSOR_FILE).is_file():
        nested = read_json_object(folder / PROCESSOR_FILE).get("image_processor")
        if isinstance(nested, dict):  # an older file of this name has nothing about images
            return nested
    file = folder / PREPROCESSOR_FILE
    return read_json_object(file) if file.is_file() or file.is_symlink() else {}


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise UserError(*problems)


def _get(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value


def _unsupported(path: Path, values: Mapping[str, Any], **expected: Any) -> list[str]:
    return [
        f"{path}: {key}={values[key]!r} cannot be loaded, only {wanted!r}"
        for key, wanted in expected.items()
        if _get(values, key, wanted) != wanted
    ]
