"""Whether this project and the peer compute the same: losses over some steps of training."""

import dataclasses
from typing import NamedTuple

import torch

from benchmarks.padded import padded_batch, peer_optimizer, peer_step
from benchmarks.peer import Peer
from benchmarks.setups import Texts
from nanovlm.config.schema import TrainConfig
from nanovlm.data.samples import samples_in_order
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train
from nanovlm.training.steps import LOSS_DECAY

NUM_STEPS = 4

TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-3, 5e-2)}
"""Largest relative difference of the losses that passes: before the first step, and after it, when
AdamW, whose first steps go by the sign of a gradient, has widened every rounding."""


class Losses(NamedTuple):
    ours: list[float]
    peer: list[float]

    def differences(self) -> list[float]:
        """Return the relative difference at each step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.ours, self.peer, strict=True)]


def check_agreement(config: TrainConfig, texts: Texts, device: torch.device) -> Losses:
    """Train both sides from the same weights on the same samples; return each step's loss.

    `texts` has only samples that fit. Raises AssertionError if the losses differ too much.
    """
    config = dataclasses.replace(
        config, epochs=10**6, warmup_ratio=0.0, lr_schedule="constant", max_grad_norm=None
    )
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
        peer = Peer(config.vlm)
    peer.copy_weights(model)
    losses = Losses(
        our_losses(model, config, texts, device), peer_losses(peer, config, texts, device)
    )
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    at_first, later = TOLERANCES[precision]
    for step, difference in enumerate(losses.differences(), start=1):
        assert difference < (at_first if step == 1 else later), f"step {step}: {losses}"
    return losses


def our_losses(
    model: VisionLanguageModel, config: TrainConfig, texts: Texts, device: torch.device
) -> list[float]:
    """Return the loss before each of the first steps."""
    milestones = [step * config.batch_size for step in range(1, NUM_STEPS + 1)]
    training = train(model, texts.prepared(), config, milestones, device=device)
    smoothed = [next(training).train_loss for _ in milestones]
    training.close()
    # The loop reports averages with weights 1, d, d^2, ... into the past.
    sums = [
        value * (1 - LOSS_DECAY**step) / (1 - LOSS_DECAY)
        for step, value in enumerate(smoothed, start=1)
    ]
    return [now - LOSS_DECAY * before for before, now in zip([0.0, *sums], sums, strict=False)]


def peer_losses(peer: Peer, config: TrainConfig, texts: Texts, device: torch.device) -> list[float]:
    """Return the loss before each of the first steps, on the samples that our loop takes."""
    optimizer = peer_optimizer(peer, config)
    size = config.batch_size
    losses = []
    for step in range(NUM_STEPS):
        indices = samples_in_order(len(texts), config.seed, step * size, (step + 1) * size)
        batch = padded_batch(texts, indices.tolist(), config.vlm.max_text_length, "right")
        losses.append(peer_step(peer, optimizer, batch.to(device)))
    return losses
