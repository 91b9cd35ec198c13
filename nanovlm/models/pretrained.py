"""Published SigLIP encoders and Llama decoders as the start of our backbones.

Their files are laid out as transformers writes them: SigLIP and SigLIP 2 of a fixed resolution,
both towers or the vision tower alone; decoders of the Llama family, tied or not.

Every tensor of a file has its target in the model: a view of one of the parameters. So q, k and v
go to the three parts of `qkv_proj`, and nothing is held twice.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.downloads import find_folder
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.models.language_model import LanguageModel
from nanovlm.models.model_files import (
    CONFIG_FILE,
    WEIGHTS_PATTERNS,
    WeightFiles,
    check_tensors,
    read_tensors,
    tensor_shapes,
    weight_files,
)
from nanovlm.models.pretrained_config import check_decoder_config, check_vision_config
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.models.vision_transformer import ViT

_VISION_NAMES = {
    r"^patch_embedding\.conv\.": "embeddings.patch_embedding.",
    r"^patch_embedding\.position_embedding$": "embeddings.position_embedding.weight",
    r"^layer_norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.ln([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
}
_DECODER_NAMES = {
    r"^token_embedding\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^head\.": "lm_head.",
    r"^blocks\.": "model.layers.",
    r"\.norm1\.": ".input_layernorm.",
    r"\.norm2\.": ".post_attention_layernorm.",
    r"\.attn\.": ".self_attn.",
    r"\.out_proj\.": ".o_proj.",
}
"""What stands in our names of parameters, as patterns, and in those of transformers."""
_TOWER = "vision_model."
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

EXTRA_TOKEN_STD = 0.02
"""Of the initial embeddings of tokens that the tokenizer does not have (nanoVLM v0.2:
models/language_model.py)."""

Targets = dict[str, Tensor]
"""Where in a model each tensor of a file belongs."""


def check_backbone_weights(config: VLMConfig) -> None:
    """Raise what `load_backbone_weights` would for a model of `config`; fetch the files.

    A program calls it before it starts workers: they find the files downloaded, and a missing one
    is an error by then.
    """
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    _find_backbones(model)


@torch.no_grad()
def load_backbone_weights(model: VisionLanguageModel) -> None:
    """Copy the weights of `vlm.vit_model_type` and `vlm.lm_model_type` into `model`, in place.

    Each is a folder with `config.json` and `model.safetensors`, or an index and its shards, or a
    hub id. The projector stays as it is. Left out are SigLIP's pooling head, text tower and logit
    scale and bias, and Llama's stored rotary frequencies, which are set from the configuration.

    A larger `lm_vocab_size` than the file's is filled up: each further row of the embedding, and
    of an untied head, is the mean of the file's rows. Rows of extra tokens are normal with
    EXTRA_TOKEN_STD, as nanoVLM draws them; here they are the same for all seeds.

    Raises:
        UserError: a file is missing or cannot be read; numbers of config.json differ from the
            model's; tensors are missing, unknown or mis-shaped. All of them are listed, and nothing
            has been copied.
    """
    backbones, vocab_size = _find_backbones(model)
    for files, targets in backbones:
        for name, tensor in read_tensors(files, targets):
            targets[name].copy_(tensor)
    _fill_up(model.decoder, vocab_size, model.config.lm_base_vocab_size)
    model.decoder.rotary_embd.reset()  # a model that was loaded here before may have had its own


def _fill_up(decoder: LanguageModel, vocab_size: int, base_size: int) -> None:
    """Set the rows after the file's `vocab_size`: the tokenizer's up to `base_size`, then extra."""
    generator = torch.Generator().manual_seed(0)
    weights = [decoder.token_embedding.weight]
    if not decoder.tied:
        weights.append(decoder.head.weight)
    for weight in weights:
        weight[vocab_size:base_size] = weight[:vocab_size].mean(dim=0)
        extra = torch.empty(weight[base_size:].shape, device="cpu")  # the same on every device
        weight[base_size:] = extra.normal_(std=EXTRA_TOKEN_STD, generator=generator)


def _find_backbones(
    model: VisionLanguageModel,
) -> tuple[list[tuple[WeightFiles, Targets]], int]:
    """Return the files of encoder and decoder, which fit, and the size of the file's vocabulary."""
    config = model.config
    names = {
        "vlm.vit_model_type": config.vit_model_type,
        "vlm.lm_model_type": config.lm_model_type,
    }
    vision_path, decoder_path = (
        find_folder(setting, name, (CONFIG_FILE,)) / CONFIG_FILE for setting, name in names.items()
    )
    problems = ErrorCollector()
    with problems:
        check_vision_config(vision_path, config)
    with problems:
        vocab_size = check_decoder_config(decoder_path, config)
    problems.raise_if_any()
    vision_files, decoder_files = (
        weight_files(find_folder(setting, name, WEIGHTS_PATTERNS))
        for setting, name in names.items()
    )
    with problems:
        vision_targets = _vision_targets(model.vision_encoder, vision_files)
    with problems:
        decoder_targets = _decoder_targets(model.decoder, decoder_files, vocab_size)
    problems.raise_if_any()
    return [(vision_files, vision_targets), (decoder_files, decoder_targets)], vocab_size


def _vision_targets(vit: ViT, files: WeightFiles) -> Targets:
    shapes = tensor_shapes(files)
    prefix = _TOWER if any(name.startswith(_TOWER) for name in shapes) else ""
    left_out = (f"{prefix}head.", "text_model.", "logit_scale", "logit_bias")
    targets: Targets = {}
    for ours, parameter in vit.named_parameters():
        name = prefix + _renamed(ours, _VISION_NAMES)
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", parameter.chunk(3), strict=True):
                targets[name.replace("qkv", letter)] = part
        else:
            targets[name] = parameter[0] if ours.endswith("position_embedding") else parameter
    used = {name: shape for name, shape in shapes.items() if not name.startswith(left_out)}
    _check(files, targets, used)
    return targets


def _decoder_targets(decoder: LanguageModel, files: WeightFiles, vocab_size: int) -> Targets:
    shapes = tensor_shapes(files)
    used = {n: shape for n, shape in shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    targets: Targets = {}
    for name, parameter in decoder.named_parameters():
        targets[_renamed(name, _DECODER_NAMES)] = parameter
    if decoder.tied and _HEAD in used:  # a tied head may be stored, as a second copy
        targets[_HEAD] = decoder.head.weight
    for name in (_HEAD, _EMBEDDING):
        if name in targets:
            targets[name] = targets[name][:vocab_size]
    _check(files, targets, used)
    if decoder.tied and _HEAD in used:
        stored = dict(read_tensors(files, {_HEAD, _EMBEDDING}))
        if not torch.equal(stored[_HEAD], stored[_EMBEDDING]):
            raise UserError(
                f"{_folder(files)}: tie_word_embeddings=true, but {_HEAD} is not {_EMBEDDING}"
            )
    return targets


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, theirs in names.items():
        name = re.sub(pattern, theirs, name)
    return name


def _check(files: WeightFiles, targets: Targets, found: Mapping[str, list[int]]) -> None:
    check_tensors(str(_folder(files)), {n: target.shape for n, target in targets.items()}, found)


def _folder(files: WeightFiles) -> Path:
    return next(iter(files)).parent
