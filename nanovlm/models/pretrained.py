"""Published SigLIP encoders and Llama decoders as the start of our backbones.

Their files are laid out as transformers writes them: SigLIP and SigLIP 2 of a fixed resolution,
both towers or the vision tower alone; decoders of the Llama family, tied or not.

Every tensor of a file has its place in the model: a view of one of the parameters. So q, k and v
go to the three parts of `qkv_proj`, and nothing is held twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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

_TOWER = "vision_model."
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class _Backbones:
    """Files that fit a model, and where in it each of their tensors belongs."""

    vision_files: WeightFiles
    vision_places: Mapping[str, Tensor]
    decoder_files: WeightFiles
    decoder_places: Mapping[str, Tensor]
    vocab_size: int


def check_backbone_weights(config: VLMConfig) -> None:
    """Raise what `load_backbone_weights` would for a model of `config`; fetch the files.

    To be asked before the start, so that what is missing is said then, and what is downloaded is
    there when several workers want it.
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
    of an untied head, is the mean of the file's rows.

    Raises:
        UserError: a file cannot be had or read; numbers of config.json differ from the model's;
            tensors are missing, unknown or mis-shaped. All of them are listed, and nothing has
            been copied.
    """
    found = _find_backbones(model)
    _copy(found.vision_files, found.vision_places)
    _copy(found.decoder_files, found.decoder_places)
    for weight in (model.decoder.token_embedding.weight, model.decoder.head.weight):
        weight[found.vocab_size :] = weight[: found.vocab_size].mean(dim=0)
    model.decoder.rotary_embd.reset()  # a saved model that was here before may have had its own


def _find_backbones(model: VisionLanguageModel) -> _Backbones:
    config = model.config
    towers = {
        "vlm.vit_model_type": config.vit_model_type,
        "vlm.lm_model_type": config.lm_model_type,
    }
    vision_path, decoder_path = (
        find_folder(place, name, (CONFIG_FILE,)) / CONFIG_FILE for place, name in towers.items()
    )
    problems = ErrorCollector()
    with problems:
        check_vision_config(vision_path, config)
    with problems:
        vocab_size = check_decoder_config(decoder_path, config)
    problems.raise_if_any()
    vision_files, decoder_files = (
        weight_files(find_folder(place, name, WEIGHTS_PATTERNS)) for place, name in towers.items()
    )
    with problems:
        vision_places = _vision_places(model.vision_encoder, vision_files)
    with problems:
        decoder_places = _decoder_places(model.decoder, decoder_files, vocab_size)
    problems.raise_if_any()
    return _Backbones(vision_files, vision_places, decoder_files, decoder_places, vocab_size)


def _vision_places(vit: ViT, files: WeightFiles) -> dict[str, Tensor]:
    """Return where in `vit` each tensor of the files belongs, which fit."""
    embedding = vit.patch_embedding
    places = _parameters(embedding.conv, "embeddings.patch_embedding")
    places["embeddings.position_embedding.weight"] = embedding.position_embedding[0]
    places |= _parameters(vit.layer_norm, "post_layernorm")
    for i, block in enumerate(vit.blocks):
        layer = f"encoder.layers.{i}"
        for ours, theirs in (
            ("ln1", "layer_norm1"),
            ("ln2", "layer_norm2"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp", "mlp"),
        ):
            places |= _parameters(block.get_submodule(ours), f"{layer}.{theirs}")
        for name, parameter in block.get_submodule("attn.qkv_proj").named_parameters():
            for letter, part in zip("qkv", parameter.chunk(3), strict=True):
                places[f"{layer}.self_attn.{letter}_proj.{name}"] = part
    shapes = tensor_shapes(files)
    prefix = _TOWER if any(name.startswith(_TOWER) for name in shapes) else ""
    left_out = (f"{prefix}head.", "text_model.", "logit_scale", "logit_bias")
    used = {name: shape for name, shape in shapes.items() if not name.startswith(left_out)}
    places = {prefix + name: place for name, place in places.items()}
    check_tensors(str(_folder(files)), {n: place.shape for n, place in places.items()}, used)
    return places


def _decoder_places(
    decoder: LanguageModel, files: WeightFiles, vocab_size: int
) -> dict[str, Tensor]:
    """Return where in `decoder` each tensor of the files belongs, which fit."""
    places = {_EMBEDDING: decoder.token_embedding.weight[:vocab_size]}
    places |= _parameters(decoder.norm, "model.norm")
    for i, block in enumerate(decoder.blocks):
        for ours, theirs in (
            ("norm1", "input_layernorm"),
            ("norm2", "post_attention_layernorm"),
            ("attn.q_proj", "self_attn.q_proj"),
            ("attn.k_proj", "self_attn.k_proj"),
            ("attn.v_proj", "self_attn.v_proj"),
            ("attn.out_proj", "self_attn.o_proj"),
            ("mlp", "mlp"),
        ):
            places |= _parameters(block.get_submodule(ours), f"model.layers.{i}.{theirs}")
    shapes = tensor_shapes(files)
    used = {n: shape for n, shape in shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    if not decoder.tied or _HEAD in used:  # a tied head may be stored, as a second copy
        places[_HEAD] = decoder.head.weight[:vocab_size]
    check_tensors(str(_folder(files)), {n: place.shape for n, place in places.items()}, used)
    if decoder.tied and _HEAD in used:
        stored = dict(read_tensors(files, {_HEAD, _EMBEDDING}))
        if not torch.equal(stored[_HEAD], stored[_EMBEDDING]):
            raise UserError(
                f"{_folder(files)}: tie_word_embeddings=true, but {_HEAD} is not {_EMBEDDING}"
            )
    return places


def _parameters(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _folder(files: WeightFiles) -> Path:
    return next(iter(files)).parent


def _copy(files: WeightFiles, places: Mapping[str, Tensor]) -> None:
    for name, tensor in read_tensors(files, places):
        places[name].copy_(tensor)
