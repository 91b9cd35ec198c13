"""A small configuration with every part of the model in it, and weights that leave nothing at 0."""

import pytest

from nanovlm.config.schema import VLMConfig
from tests.hub_files import Randomize, randomize


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


@pytest.fixture(name="randomize")
def randomize_fixture() -> Randomize:
    """Give norms and biases random values too, so that no two parameters can be confused."""
    return randomize
