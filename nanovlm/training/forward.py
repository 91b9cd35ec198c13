"""From a batch to its loss: what training and evaluation do alike on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """Return the context of a forward pass: bfloat16 products on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def image_input(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8[B,3,S,S] as float32[B,3,S,S] between 0 and 1 on `device`."""
    return images.to(device, non_blocking=True).float().div_(255)


def answer_loss_sum(model: VisionLanguageModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the sum of the cross-entropies of all labelled tokens, float32[].

    Logits are computed at the labelled positions alone: a prompt has many tokens, an answer few.
    """
    targets = batch.targets.flatten()
    labelled = (targets != IGNORED_TARGET).nonzero().squeeze(1)  # found on the host: no device sync
    with mixed_precision(device):
        hidden = model.hidden_states(
            batch.input_ids.to(device, non_blocking=True), image_input(batch.images, device)
        )  # (B, T, D)
        positions = labelled.to(device, non_blocking=True)
        logits = model.decoder.head(hidden.flatten(0, 1).index_select(0, positions))
    labels = targets[labelled].to(device, non_blocking=True)
    return F.cross_entropy(logits.float(), labels, reduction="sum")
