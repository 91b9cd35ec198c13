"""A small configuration with every part of the model in it, and weights that leave nothing at 0."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nanovlm.config import VLMConfig


@pytest.fixture
def tiny() -> VLMConfig:
    """16 patches, 4 image tokens, 4 query heads on 2 key-value heads, 50 tokens."""
    return VLMConfig(
        vit_hidden_dim=32,
        vit_patch_size=8,
        vit_img_size=32,
        vit_n_heads=2,
        vit_n_blocks=2,
        lm_hidden_dim=32,
        lm_inter_dim=64,
        lm_vocab_size=50,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=2,
        lm_max_length=40,
        lm_tie_weights=False,
        vlm_load_backbone_weights=False,
    )


@pytest.fixture
def randomize() -> Callable[[nn.Module], None]:
    """Give norms and biases random values too, so that no two parameters can be confused."""

    @torch.no_grad()
    def fill(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(module.named_parameters()):
            parameter.normal_(std=0.2, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)

    return fill
