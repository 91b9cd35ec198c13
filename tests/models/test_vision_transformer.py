"""The vision encoder against transformers' SigLIP."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from nanovlm.config.schema import VLMConfig
from nanovlm.models.vision_transformer import ViT

RENAMED = {
    "embeddings.patch_embedding": "patch_embedding.conv",
    "embeddings.position_embedding.weight": "patch_embedding.position_embedding",
    "encoder.layers": "blocks",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn": "attn",
    "post_layernorm": "layer_norm",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return SigLIP's weights under our names: q, k and v are one matrix here."""
    weights = {}
    for name, weight in theirs.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights[name] = weight
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    position = "patch_embedding.position_embedding"
    weights[position] = weights[position][None]
    return weights


@pytest.mark.parametrize(
    ("dim", "heads", "blocks", "patch", "side", "inter", "eps"),
    [
        (32, 2, 2, 8, 32, None, 1e-6),
        (48, 4, 3, 4, 20, 40, 1e-3),
        (16, 1, 1, 16, 16, 64, 1e-6),
        (64, 8, 1, 16, 64, 96, 1e-6),
    ],
)
def test_equals_siglip(
    randomize: Callable[[nn.Module], None],
    dim: int,
    heads: int,
    blocks: int,
    patch: int,
    side: int,
    inter: int | None,
    eps: float,
) -> None:
    config = VLMConfig(
        vit_hidden_dim=dim,
        vit_n_heads=heads,
        vit_n_blocks=blocks,
        vit_patch_size=patch,
        vit_img_size=side,
        vit_inter_dim=inter,
        vit_ln_eps=eps,
        mp_pixel_shuffle_factor=1,
    )
    reference = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=dim,
            num_attention_heads=heads,
            num_hidden_layers=blocks,
            patch_size=patch,
            image_size=side,
            intermediate_size=config.vit_mlp_dim,
            layer_norm_eps=eps,
            vision_use_head=False,
        )
    ).eval()
    randomize(reference)
    vit = ViT(config).eval()
    vit.load_state_dict(ours(reference.state_dict()))
    image = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(image).last_hidden_state
        actual = vit(image)
    assert actual.shape == (3, (side // patch) ** 2, dim)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only(tiny: VLMConfig) -> None:
    vit = ViT(dataclasses.replace(tiny, vit_dropout=0.5))
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(vit(image), vit(image))
    vit.eval()
    assert torch.equal(vit(image), vit(image))
