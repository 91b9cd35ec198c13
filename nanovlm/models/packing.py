"""Samples of different lengths in one row of tokens, so that nothing is computed for padding.

The row holds all image tokens, sample by sample, then all text tokens, then spare ones. Whatever
treats tokens one by one (projections, norms, MLPs) works on the row. Attention alone works on the
padded view, a line for each sample, in which a token sees those before it in its own line and no
others; padding stands at the end of a line, where no real token looks.

Shapes: B samples, I image tokens each, M text tokens of all samples, spare ones included,
        N = B * I + M tokens of the row, T places in a line.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each token of a row stands.

    The row has at least one spare token, its last, and the padded view one spare line, its last.
    Padding shows the spare token, and spare tokens show a place of the spare line; no loss depends
    on either, so their gradients are zero and gather is all it takes in both directions.
    """

    positions: Tensor
    """int64[N], the place of each token in its sample, the image first."""
    tokens: Tensor
    """int64[(B + 1) * T], the token that each place of the padded view shows."""
    places: Tensor
    """int64[N], the place of the padded view where each token stands."""
    last: Tensor
    """int64[B], the last token of each sample."""

    def to(self, device: torch.device) -> "Packing":
        """Return the same on `device`."""
        return Packing(*(tensor.to(device) for tensor in self))


def pack(
    text_lengths: Tensor, num_image_tokens: int, num_text: int, line: int | None = None
) -> Packing:
    """Return the packing of B samples, on the CPU.

    Args:
        text_lengths: int64[B], text tokens of each sample; 0 leaves the image alone.
        num_text: M, more than the sum of `text_lengths`.
        line: T, at least the longest sample; None takes that.
    """
    num_samples = len(text_lengths)
    num_real = int(text_lengths.sum())
    assert num_real < num_text, f"no spare token among {num_text} for texts of {num_real}"
    longest = num_image_tokens + int(text_lengths.max())
    line = line or longest
    assert line >= longest, f"no room in a line of {line} for a sample of {longest}"
    starts = text_lengths.cumsum(0) - text_lengths  # (B,) of each text among the text tokens
    sample = torch.arange(num_samples).repeat_interleave(text_lengths)  # of each real text token
    text_positions = num_image_tokens + torch.arange(num_real) - starts[sample]
    first_text, spare = num_samples * num_image_tokens, num_samples * line

    positions = torch.zeros(first_text + num_text, dtype=torch.int64)
    images = positions[:first_text].view(num_samples, num_image_tokens)
    images.copy_(torch.arange(num_image_tokens))
    positions[first_text : first_text + num_real] = text_positions
    places = torch.full_like(positions, spare)
    lines = torch.arange(num_samples) * line
    places[:first_text] = (images + lines[:, None]).flatten()
    places[first_text : first_text + num_real] = text_positions + lines[sample]
    tokens = torch.full((spare + line,), len(positions) - 1)
    num_placed = first_text + num_real
    tokens[places[:num_placed]] = torch.arange(num_placed)
    last = tokens[lines + num_image_tokens + text_lengths - 1]
    return Packing(positions, tokens, places, last)


class _Gather(torch.autograd.Function):
    """`x[index]`, for an index that is undone by another: the gradient is gathered as well.

    The gradient of an ordinary index would be summed up token by token, for tokens that occur
    only once.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def to_lines(x: Tensor, packing: Packing) -> Tensor:
    """Return the padded view of a row: float[N, H, K] -> float[B + 1, H, T, K]"""
    lines = _Gather.apply(x, packing.tokens, packing.places)
    return lines.unflatten(0, (len(packing.last) + 1, -1)).transpose(1, 2)


def to_row(lines: Tensor, packing: Packing) -> Tensor:
    """Return the row of a padded view: float[B + 1, H, T, K] -> float[N, H, K]"""
    places = lines.transpose(1, 2).flatten(0, 1)
    return _Gather.apply(places, packing.places, packing.tokens)
