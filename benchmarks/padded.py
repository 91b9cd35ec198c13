"""Texts in padded lines, and the plain training loop over the peer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peer import Peer
from benchmarks.setups import EOS, Texts
from nanovlm.config.schema import TrainConfig

NO_LABEL = -100


class PaddedBatch(NamedTuple):
    """B samples, texts in lines of T tokens."""

    input_ids: Tensor
    """int64[B, T]"""
    images: Tensor
    """uint8[B, 3, S, S]"""
    attention_mask: Tensor
    """int64[B, T], 0 for padding."""
    targets: Tensor
    """int64[B, T], the token that follows where that is learnt, else -100."""
    num_useful: int
    """Samples that carry a label."""

    def to(self, device: torch.device) -> "PaddedBatch":
        tensors = {name: getattr(self, name).to(device) for name in self._fields[:-1]}
        return self._replace(**tensors)


def padded_batch(texts: Texts, indices: Sequence[int], length: int, side: str) -> PaddedBatch:
    """Return the samples `indices` in lines of `length` tokens, padded on the `side`.

    A text that is longer is cut to its last tokens and loses its labels, as in nanoVLM v0.1.
    """
    lines, masks, targets, num_useful = [], [], [], 0
    for index in indices:
        tokens = texts.tokens[index]
        labels = F.pad(tokens[1:], (0, 1), value=NO_LABEL)
        labels[: texts.prompt_lengths[index] - 1] = NO_LABEL
        if len(tokens) > length:
            tokens, labels = tokens[-length:], torch.full((length,), NO_LABEL)
        else:
            num_useful += 1
        missing = length - len(tokens)
        padding = (missing, 0) if side == "left" else (0, missing)
        lines.append(F.pad(tokens, padding, value=EOS))
        masks.append(F.pad(torch.ones_like(tokens), padding))
        targets.append(F.pad(labels, padding, value=NO_LABEL))
    images = texts.images[torch.tensor(indices) % len(texts.images)]
    return PaddedBatch(
        torch.stack(lines), images, torch.stack(masks), torch.stack(targets), num_useful
    )


def peer_optimizer(peer: Peer, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with torch's defaults, over the two groups of nanoVLM v0.1."""
    backbones = [*peer.vision_encoder.parameters(), *peer.decoder.parameters()]
    groups = [
        {"params": list(peer.projector.parameters()), "lr": config.lr_mp},
        {"params": backbones, "lr": config.lr_backbones},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def peer_loss(peer: torch.nn.Module, batch: PaddedBatch) -> Tensor:
    """Return the mean loss of the learnt tokens, float32[]."""
    device = batch.input_ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = peer(batch.input_ids, batch.images, batch.attention_mask)
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=NO_LABEL
        )


def peer_step(peer: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: PaddedBatch) -> float:
    """Take one optimizer step; return the loss before it."""
    optimizer.zero_grad()
    loss = peer_loss(peer, batch)
    loss.backward()
    optimizer.step()
    return loss.item()
