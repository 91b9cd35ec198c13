"""Model folders in the hub's own formats, made with transformers: there is no hub in the tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nanovlm.config.schema import VLMConfig

Randomize = Callable[[nn.Module], None]


@torch.no_grad()
def randomize(module: nn.Module, std: float = 0.2) -> None:
    """Give all parameters random values, norms and biases too: no two of them can be confused."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        parameter.normal_(std=std, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1.0)


def make_siglip(
    config: VLMConfig, randomize: Randomize = randomize, **options: Any
) -> SiglipVisionModel:
    """Save a vision tower alone."""
    vision = SiglipVisionModel(_vision_numbers(config)).eval()
    randomize(vision)
    vision.save_pretrained(config.vit_model_type, **options)
    return vision


def make_two_towers(
    config: VLMConfig, randomize: Randomize = randomize, **options: Any
) -> nn.Module:
    """Save both towers, as the published SigLIP repositories hold them; return the vision tower."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    numbers = SiglipConfig(text_config=text, vision_config=_vision_numbers(config).to_dict())
    both = SiglipModel(numbers).eval()
    randomize(both)
    both.save_pretrained(config.vit_model_type, **options)
    return both.vision_model


def make_llama(
    config: VLMConfig, randomize: Randomize = randomize, **options: Any
) -> LlamaForCausalLM:
    """Save a decoder."""
    numbers = LlamaConfig(
        hidden_size=config.lm_hidden_dim,
        intermediate_size=config.lm_inter_dim,
        num_hidden_layers=config.lm_n_blocks,
        num_attention_heads=config.lm_n_heads,
        num_key_value_heads=config.lm_n_kv_heads,
        rms_norm_eps=config.lm_rms_eps,
        vocab_size=config.lm_vocab_size,
        tie_word_embeddings=config.lm_tie_weights,
        rope_parameters={"rope_type": "default", "rope_theta": config.lm_re_base},
    )
    decoder = LlamaForCausalLM(numbers).eval()
    randomize(decoder)
    decoder.save_pretrained(config.lm_model_type, **options)
    return decoder


def _vision_numbers(config: VLMConfig) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=config.vit_hidden_dim,
        intermediate_size=config.vit_mlp_dim,
        num_hidden_layers=config.vit_n_blocks,
        num_attention_heads=config.vit_n_heads,
        layer_norm_eps=config.vit_ln_eps,
        patch_size=config.vit_patch_size,
        image_size=config.vit_img_size,
    )
