"""Choosing the next token from logits.

Shapes: B sequences, V tokens in the vocabulary.
"""

import torch
from torch import Generator, Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a setting is out of its range."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, got {top_p}")


def likeliest(logits: Tensor) -> Tensor:
    """Take the likeliest token of each sequence: float[B, V] -> int[B]."""
    return logits.argmax(dim=-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draw one token a sequence: float[B, V] -> int[B].

    Args:
        temperature: divides the logits; below 1 sharpens the choice.
        top_k: only the k likeliest tokens can be drawn.
        top_p: of those, only the fewest likeliest that together reach this probability.
        generator: the random numbers, on the device of the logits; None takes the global ones.
    """
    num_kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    kept, tokens = logits.topk(num_kept)  # (B, num_kept), likeliest first
    probabilities = torch.softmax(kept.float() / temperature, dim=-1)
    if top_p is not None:
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(reached_before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)
