"""Training in bfloat16 follows training in float32."""

import pytest
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train
from tests.devices import on_each_device, use_bfloat16
from tests.tiny import vlm_config
from tests.training.samples import random_samples

VLM = vlm_config(
    vit_patch_size=4,
    vit_img_size=8,
    vit_hidden_dim=32,
    vit_n_blocks=2,
    lm_hidden_dim=32,
    lm_inter_dim=64,
    lm_n_blocks=2,
    lm_vocab_size=32,
    lm_max_length=16,
)
CONFIG = TrainConfig(batch_size=4, epochs=10, lr_mp=3e-3, lr_backbones=3e-3, compile=False, vlm=VLM)
EVERY_STEP = tuple(range(4, 121, 4))


@on_each_device
def test_the_loss_follows_that_in_float32(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2 % at each of 30 steps, in which it falls to less than a third."""

    def curve(in_bfloat16: bool) -> list[float]:
        use_bfloat16(monkeypatch, in_bfloat16)
        model = VisionLanguageModel(VLM, seed=3).to(device)
        reports = train(model, random_samples(), CONFIG, EVERY_STEP, device=device)
        return [report.train_loss for report in reports]

    expected, reduced = curve(in_bfloat16=False), curve(in_bfloat16=True)
    assert reduced == pytest.approx(expected, rel=0.02)
    assert max(abs(a / b - 1) for a, b in zip(reduced, expected, strict=True)) > 1e-4
    assert expected[-1] < expected[0] / 3
