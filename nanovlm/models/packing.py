"""Samples of different lengths in one row of tokens, so that nothing is computed for padding.

The row holds all image tokens, sample by sample, then all text tokens, then padding. Whatever
treats tokens one by one (projections, norms, MLPs) works on the row. Attention alone works on the
padded view, a sequence for each sample, in which a token sees those before it in its own sequence
and no others; padding stands at the end of a sequence, where no real token looks.

Shapes: B samples, I image tokens each, M text tokens of all samples, padding included,
        N = B * I + M tokens of the row, T tokens of a sequence in the padded view.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each token of a row stands.

    The row ends with at least one token of padding, and the padded view with one sequence of
    padding. Padding of the view shows the row's last token, and padding of the row shows the
    view's last sequence; no loss depends on either, so their gradients are zero and gather is all
    it takes in both directions.
    """

    positions: Tensor
    """int64[N], the position of each token in its sample, the image first."""
    pad_index: Tensor
    """int64[(B + 1) * T], the token of the row that each position of the padded view shows."""
    unpad_index: Tensor
    """int64[N], the position in the padded view of each token of the row."""
    last: Tensor
    """int64[B], the last token of each sample."""

    def to(self, device: torch.device) -> "Packing":
        """Return the same on `device`."""
        return Packing(*(tensor.to(device) for tensor in self))


def pack(
    text_lengths: Tensor, num_image_tokens: int, num_text: int, padded_length: int | None = None
) -> Packing:
    """Return the packing of B samples, on the CPU.

    Args:
        text_lengths: int64[B], text tokens of each sample; 0 leaves the image alone.
        num_text: M, more than the sum of `text_lengths`.
        padded_length: T, at least the longest sample; None takes that.
    """
    num_samples = len(text_lengths)
    num_real = int(text_lengths.sum())
    assert num_real < num_text, f"no padding among {num_text} tokens for texts of {num_real}"
    longest = num_image_tokens + int(text_lengths.max())
    length = padded_length or longest
    assert length >= longest, f"no room in a padded length of {length} for a sample of {longest}"
    starts = text_lengths.cumsum(0) - text_lengths  # (B,) of each text among the text tokens
    sample = torch.arange(num_samples).repeat_interleave(text_lengths)  # of each real text token
    text_positions = num_image_tokens + torch.arange(num_real) - starts[sample]
    first_text, padding = num_samples * num_image_tokens, num_samples * length
    end_text = first_text + num_real

    positions = torch.zeros(first_text + num_text, dtype=torch.int64)
    images = positions[:first_text].view(num_samples, num_image_tokens)
    images.copy_(torch.arange(num_image_tokens))
    positions[first_text:end_text] = text_positions
    sequences = torch.arange(num_samples) * length  # (B,) where each begins in the padded view
    unpad_index = torch.full_like(positions, padding)
    unpad_index[:first_text] = (images + sequences[:, None]).flatten()
    unpad_index[first_text:end_text] = text_positions + sequences[sample]
    pad_index = torch.full((padding + length,), len(positions) - 1)
    pad_index[unpad_index[:end_text]] = torch.arange(end_text)
    last = pad_index[sequences + num_image_tokens + text_lengths - 1]
    return Packing(positions, pad_index, unpad_index, last)


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


def pad(x: Tensor, packing: Packing) -> Tensor:
    """Return the padded view of a row: float[N, H, K] -> float[B + 1, H, T, K]"""
    padded = _Gather.apply(x, packing.pad_index, packing.unpad_index)
    return padded.unflatten(0, (len(packing.last) + 1, -1)).transpose(1, 2)


def unpad(padded: Tensor, packing: Packing) -> Tensor:
    """Return the row of a padded view: float[B + 1, H, T, K] -> float[N, H, K]"""
    flat = padded.transpose(1, 2).flatten(0, 1)
    return _Gather.apply(flat, packing.unpad_index, packing.pad_index)
