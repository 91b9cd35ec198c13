"""FLOPs from the configuration, against those that torch counts while the model runs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.flops import (
    PEAK_TFLOPS,
    ModelFlops,
    Trained,
    model_flops,
    peak_flops_per_second,
    trained_parts,
)
from nanovlm.training.optim import build_optimizer
from tests.tiny import vlm_config

BATCH, TEXT = 2, 7

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "grouped queries": {"lm_n_blocks": 2, "vit_n_blocks": 3},
    "as many keys as queries": {"lm_n_kv_heads": 4, "lm_inter_dim": 40},
    "one token a patch": {"mp_pixel_shuffle_factor": 1, "vit_inter_dim": 24},
    "a head of its own": {"lm_tie_weights": False, "lm_n_kv_heads": 1},
}


def counted(config: TrainConfig, backward: bool) -> int:
    """Return the FLOPs that torch counts for a batch with a label at every text token."""
    model = VisionLanguageModel(config.vlm)
    build_optimizer(model, config)
    ids = torch.zeros(BATCH, TEXT, dtype=torch.int64)
    image = torch.zeros(BATCH, 3, config.vlm.vit_img_size, config.vlm.vit_img_size)
    # With plain products: the counter has no formula for the CPU's fused attention, and that of
    # the others counts what they compute twice.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(backward),
    ):
        logits, _ = model(ids, image)
        if backward:
            F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops()


def with_full_attention(flops: ModelFlops, config: VLMConfig) -> int:
    """Return the FLOPs of the same batch as it is computed.

    Plain products compute all n^2 pairs, half in vain; and the row and its padded view have
    padding.
    """
    length = config.num_image_tokens + TEXT
    return (
        BATCH * (flops.vision_encoder + flops.projector + TEXT * flops.head)
        + (BATCH * length + 1) * flops.decoder_token
        + (BATCH + 1) * length**2 * flops.decoder_pair
    )


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_forward_pass_is_what_torch_counts(changes: dict[str, Any]) -> None:
    config = TrainConfig(vlm=vlm_config(**changes))
    expected = counted(config, backward=False)
    assert with_full_attention(model_flops(config.vlm), config.vlm) == expected


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"freeze": "vision_encoder"},
        {"freeze": "backbones"},
        {"lr_backbones": 0.0},
        {"lr_vision_backbone": 0.0},
        {"lr_language_backbone": 0.0},
        {"lr_mp": 0.0, "lr_language_backbone": 0.0},
        {"lr_mp": 0.0},
        {"lr_mp": 0.0, "freeze": "vision_encoder"},
    ],
)
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_training_is_what_torch_counts(changes: dict[str, Any], training: dict[str, Any]) -> None:
    config = TrainConfig(vlm=vlm_config(**changes), **training)
    expected = counted(config, backward=True)
    flops = model_flops(config.vlm, trained_parts(config))
    assert with_full_attention(flops, config.vlm) == expected


def test_nanovlm_222m() -> None:
    """The known budget of a sample of 128 tokens, all labelled, 3 x forward, in GFLOP."""
    forward = model_flops(VLMConfig())
    text = 128 - forward.num_image_tokens
    images = forward.vision_encoder + forward.projector
    assert round(3 * forward.vision_encoder / 1e9) == 105
    assert round(3 * (forward.of_samples([text], 0) - images) / 1e9) == 83
    assert round(3 * 128 * forward.head / 1e9) == 22
    assert round(3 * forward.of_samples([text], 128) / 1e9) == 210


def test_samples_are_counted_one_by_one() -> None:
    """Attention grows with the square of a sample's length, not of the batch's."""
    flops = ModelFlops(
        vision_encoder=10**10,
        projector=10**9,
        decoder_token=10**6,
        decoder_pair=10,
        head=1,
        num_image_tokens=49,
    )
    # Sequences of 50 and 52 tokens have 50 x 51 / 2 and 52 x 53 / 2 pairs.
    expected = 2 * (10**10 + 10**9) + (50 + 52) * 10**6 + 10 * (1275 + 1378) + 4
    assert flops.of_samples([1, 3], num_labels=4) == expected
    assert flops.of_samples(np.array([1, 3], dtype=np.int32), num_labels=4) == expected
    assert flops.of_samples([1, 3], num_labels=4, num_images=[1, 1]) == expected
    # Two tiles beside one token and no image beside three: 99 tokens and 3.
    tiled = 2 * (10**10 + 10**9) + (99 + 3) * 10**6 + 10 * (4950 + 6) + 4
    assert flops.of_samples([1, 3], num_labels=4, num_images=np.array([2, 0])) == tiled


def test_what_is_trained() -> None:
    everything = Trained(vision_encoder=True, projector=True, decoder=True)
    assert trained_parts(TrainConfig()) == everything
    projector = Trained(vision_encoder=False, projector=True, decoder=False)
    assert trained_parts(TrainConfig(freeze="backbones")) == projector
    assert trained_parts(TrainConfig(lr_backbones=0.0)) == projector
    without_decoder = Trained(vision_encoder=True, projector=True, decoder=False)
    assert trained_parts(TrainConfig(lr_language_backbone=0.0)) == without_decoder
    assert trained_parts(TrainConfig(lr_backbones=0.0, lr_vision_backbone=1e-4)) == without_decoder


def test_peaks() -> None:
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3") == 989.4e12
    for other in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 D", "cpu"):
        assert peak_flops_per_second(other) is None
    assert all(40 < tflops < 3000 and source for tflops, source in PEAK_TFLOPS.values())
