"""From a batch to its loss: what training and evaluation do alike on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.config import VLMConfig
from nanovlm.data.batches import Batch
from nanovlm.models.vision_language_model import IGNORED_TARGET, VisionLanguageModel


@contextmanager
def evaluating(model: VisionLanguageModel) -> Iterator[None]:
    """Switch `model` to evaluation without gradients, and back to the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 products on CUDA, float32 elsewhere.

    Float32 too on a GPU that has no bfloat16 in its hardware: emulated it would be slower.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether `device`, the current one if it is a GPU, multiplies bfloat16 in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def image_input(images: Tensor, config: VLMConfig, device: torch.device) -> Tensor:
    """Return uint8[B,3,S,S] as what the vision encoder reads, float32[B,3,S,S] on `device`.

    Values from 0 to 1, less the mean, divided by the standard deviation of each channel.
    """
    pixels = images.to(device, non_blocking=True).float().div_(255)
    # Python numbers travel with the kernel; a tensor of them would be one more copy each step.
    for channel, mean, std in zip(
        pixels.unbind(1), config.image_mean, config.image_std, strict=True
    ):
        channel.sub_(mean).div_(std)
    return pixels


def answer_loss_sum(model: VisionLanguageModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the sum of the cross-entropies of all labelled tokens, float32[].

    Logits are computed at the labelled positions alone: a prompt has many tokens, an answer few.
    """
    targets = batch.targets.flatten()
    labelled = (targets != IGNORED_TARGET).nonzero().squeeze(1)  # found on the host: no device sync
    with mixed_precision(device):
        hidden = model.hidden_states(
            batch.input_ids.to(device, non_blocking=True),
            image_input(batch.images, model.config, device),
        )  # (B, T, D)
        positions = labelled.to(device, non_blocking=True)
        logits = model.decoder.head(hidden.flatten(0, 1).index_select(0, positions))
    labels = targets[labelled].to(device, non_blocking=True)
    return F.cross_entropy(logits.float(), labels, reduction="sum")
