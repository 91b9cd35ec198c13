"""What the vision encoder is shown."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nanovlm.config.generations import PUBLISHED_IMAGES
from nanovlm.config.schema import VLMConfig
from nanovlm.training.forward import image_input, mixed_precision

CPU = torch.device("cpu")
EVERY_GREY = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)


def test_a_new_model_is_shown_what_siglip_was_trained_on() -> None:
    """Against transformers' processor with the numbers of google/siglip-base-patch16-224."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(40, 70, 3), dtype=np.uint8))
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]

    config = VLMConfig(vit_img_size=32)
    resampling = Image.Resampling[config.image_resampling.upper()]
    pixels = torch.from_numpy(np.array(image.resize((32, 32), resampling))).permute(2, 0, 1)
    shown = image_input(pixels[None], config)
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert shown.min() < -0.5 and shown.max() > 0.5


def test_a_published_model_is_shown_values_from_0_to_1_to_the_bit() -> None:
    config = VLMConfig(**PUBLISHED_IMAGES)
    assert torch.equal(image_input(EVERY_GREY, config), EVERY_GREY.float() / 255)


def test_each_channel_has_its_own_numbers() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    shown = image_input(EVERY_GREY, VLMConfig(image_mean=mean, image_std=std))
    for channel in range(3):
        expected = (EVERY_GREY[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(shown[:, channel].double(), expected, atol=1e-6, rtol=0)
    assert EVERY_GREY.max() == 255  # what was prepared stays as it is


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    images = EVERY_GREY.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        image_input(images, VLMConfig())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation  # as on a V100, which torch lets emulate it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    with mixed_precision(torch.device("cuda")):
        assert not torch.is_autocast_enabled("cuda")
    assert False in asked


@pytest.mark.gpu
def test_a_gpu_with_bfloat16_uses_it() -> None:
    cuda = torch.device("cuda")
    expected = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    with mixed_precision(cuda):
        product = torch.ones(8, 8, device=cuda) @ torch.ones(8, 8, device=cuda)
    assert product.dtype == expected


def test_the_cpu_computes_in_float32() -> None:
    with mixed_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
