"""Checkpoints of nanoVLM v0.2 and 8k as nanoVLM itself writes them, from modules of transformers.

The names of the tensors are those of the published key table; nothing of ours takes part.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.hub_files import randomize

CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 16, "vit_inter_dim": 24, "vit_patch_size": 8, "vit_img_size": 32,
    "vit_n_heads": 2, "vit_dropout": 0.0, "vit_n_blocks": 2, "vit_ln_eps": 1e-06,
    "vit_cls_flag": False, "vit_model_type": "google/siglip2-base-patch16-256",
    "lm_hidden_dim": 12, "lm_inter_dim": 20, "lm_rms_eps": 1e-05, "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192, "lm_base_vocab_size": 30, "extra_token_amount": 1,
    "lm_vocab_size": 31, "lm_n_heads": 3, "lm_n_kv_heads": 1, "lm_dropout": 0.0,
    "lm_n_blocks": 3, "lm_attn_scaling": 1.0, "lm_max_length": 512, "lm_use_tokens": False,
    "lm_tie_weights": True, "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct", "lm_eos_token_id": 0,
    "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4,
    "vlm_extra_tokens": {"image_token": "<|image|>"}, "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints", "hf_repo_name": "nanoVLM",
}  # fmt: skip
"""The 35 keys of a published config.json. Of them lm_eos_token_id is read nowhere there: the
tokenizer's EOS, here 2, ends a text."""

IMAGE_TOKEN = 30
"""The id of `<|image|>`, the first one that the tokenizer does not have."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
CHANGES_8K: dict[str, Any] = {
    "extra_token_amount": 66, "lm_vocab_size": 96, "lm_max_length": 4096, "max_img_size": 128,
    "resize_to_max_side_len": False, "lm_chat_template": CHAT_TEMPLATE,
    "vlm_extra_tokens": {
        "image_token": "<|image|>", "global_image_token": "<|global_image|>",
        **{f"r{i}c{j}": f"<row_{i}_col_{j}>" for i in range(1, 9) for j in range(1, 9)},
    },
    "vit_model_type": "google/siglip2-base-patch16-512", "lm_eos_token_id": None,
}  # fmt: skip
"""What `write_checkpoint` changes for a config.json of 8k, with 37 keys; of `make_parts(96)`."""


class Parts(NamedTuple):
    """What transformers computes; the projector is one matrix."""

    vision: SiglipVisionModel
    projector: Tensor
    """float[lm_hidden_dim, factor^2 * vit_hidden_dim]"""
    decoder: LlamaForCausalLM


def make_parts(vocab_size: int = 31) -> Parts:
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            layer_norm_eps=1e-6, patch_size=8, image_size=32,
        )
    ).eval()  # fmt: skip
    decoder = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=True,
            vocab_size=vocab_size, rope_parameters={"rope_type": "default", "rope_theta": 100000},
        )
    ).eval()  # fmt: skip
    for part in (vision, decoder):
        randomize(part)
    projector = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    return Parts(vision, projector, decoder)


def write_checkpoint(folder: Path, parts: Parts, **changes: Any) -> Path:
    """Write both files; `changes` are of the configuration, None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values, indent=4))
    metadata = {"format": "pt", "decoder.token_embedding.weight": "decoder.head.weight"}
    save_file(_tensors(parts), folder / "model.safetensors", metadata=metadata)
    return folder


def _tensors(parts: Parts) -> dict[str, Tensor]:
    vision = _state(parts.vision)
    decoder = _state(parts.decoder)
    tensors = {
        "vision_encoder.patch_embedding.position_embedding": vision[
            "embeddings.position_embedding.weight"
        ][None],
        "MP.proj.weight": parts.projector,
        "decoder.rotary_embd.inv_freq": 1.0 / 100000 ** (torch.arange(0, 4, 2).float() / 4),
        "decoder.norm.weight": decoder["norm.weight"],
        "decoder.head.weight": decoder["embed_tokens.weight"],
    }
    for kind in ("weight", "bias"):
        ours = "vision_encoder"
        tensors[f"{ours}.patch_embedding.conv.{kind}"] = vision[
            f"embeddings.patch_embedding.{kind}"
        ]
        tensors[f"{ours}.layer_norm.{kind}"] = vision[f"post_layernorm.{kind}"]
        for i in range(2):
            block, layer = f"{ours}.blocks.{i}", f"encoder.layers.{i}"
            tensors[f"{block}.attn.qkv_proj.{kind}"] = torch.cat(
                [vision[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
            tensors[f"{block}.attn.out_proj.{kind}"] = vision[f"{layer}.self_attn.out_proj.{kind}"]
            for mine, theirs in (("ln1", "layer_norm1"), ("ln2", "layer_norm2")):
                tensors[f"{block}.{mine}.{kind}"] = vision[f"{layer}.{theirs}.{kind}"]
            for name in ("mlp.fc1", "mlp.fc2"):
                tensors[f"{block}.{name}.{kind}"] = vision[f"{layer}.{name}.{kind}"]
    names = {f"attn.{letter}_proj": f"self_attn.{letter}_proj" for letter in "qkv"}
    names |= {f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    names |= {"attn.out_proj": "self_attn.o_proj", "norm1": "input_layernorm"}
    names |= {"norm2": "post_attention_layernorm"}
    for i in range(3):
        for mine, theirs in names.items():
            tensors[f"decoder.blocks.{i}.{mine}.weight"] = decoder[f"layers.{i}.{theirs}.weight"]
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors; versions of transformers differ in the names of wrappers."""
    return {
        name.removeprefix("vision_model.").removeprefix("model."): tensor
        for name, tensor in module.state_dict().items()
    }


@torch.no_grad()
def joined_logits(parts: Parts, text: Tensor, image: Tensor) -> Tensor:
    """Return the logits at the text's tokens as nanoVLM v0.2 computes them.

    Placeholders stand in front of the text, and their embeddings are replaced by the image's.

    int[B, T], float[B, 3, S, S] -> float[B, T, V]
    """
    ids = torch.cat((torch.full((len(text), 4), IMAGE_TOKEN), text), dim=1)
    return placeholder_logits(parts, ids, image)[:, 4:]


@torch.no_grad()
def placeholder_logits(parts: Parts, ids: Tensor, images: Tensor) -> Tensor:
    """Return the logits at all tokens, with the images in the place of the placeholders, in order.

    int[B, T], float[K, 3, S, S] -> float[B, T, V]
    """
    embeddings = parts.decoder.get_input_embeddings()(ids)
    if len(images):
        embeddings[ids == IMAGE_TOKEN] = _image_tokens(parts, images).flatten(0, 1)
    logits: Tensor = parts.decoder(inputs_embeds=embeddings).logits
    return logits


def _image_tokens(parts: Parts, images: Tensor) -> Tensor:
    """float[K, 3, S, S] -> float[K, 4, 12]"""
    patches = parts.vision(pixel_values=images).last_hidden_state  # (K, 16, 16)
    blocks = []
    for row in (0, 2):
        for column in (0, 2):
            four = [4 * (row + i) + column + j for i in (0, 1) for j in (0, 1)]
            blocks.append(torch.cat([patches[:, patch] for patch in four], dim=-1))
    return torch.stack(blocks, dim=1) @ parts.projector.T
