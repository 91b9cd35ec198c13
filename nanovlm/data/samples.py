"""Training samples as tensors, their order, and batches of them."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The target of a token that carries no label; what cross-entropy leaves out by default."""


@dataclass(frozen=True, eq=False)
class PreparedSamples:
    """N samples, each one turn about one of R images.

    Sample i has the tokens `tokens[offsets[i] : offsets[i + 1]]`: prompt, answer, EOS. The tensors
    are files mapped into memory: to write to one ends the process.
    """

    images: Tensor
    """uint8[R, 3, S, S]"""
    image_index: Tensor
    """int64[N], the image of each sample."""
    tokens: Tensor
    """int32[all tokens], one sample after the other."""
    offsets: Tensor
    """int64[N + 1]"""
    prompt_lengths: Tensor
    """int64[N], tokens of each prompt; those after it are learnt."""

    def __len__(self) -> int:
        return len(self.image_index)

    @cached_property
    def text_lengths(self) -> Tensor:
        """int64[N], input tokens of each sample: all but the EOS, which nothing follows."""
        return self.offsets.diff() - 1

    @cached_property
    def num_answer_tokens(self) -> Tensor:
        """int64[N], tokens of each answer, EOS included."""
        return self.offsets.diff() - self.prompt_lengths


class Batch(NamedTuple):
    """B samples, their texts one after the other in M tokens; the last one or more are padding."""

    token_ids: Tensor
    """int64[M], without the EOS of each sample, which nothing follows; 0 for padding."""
    targets: Tensor
    """int64[M], the token that follows each input token where that is learnt, else -100."""
    text_lengths: Tensor
    """int64[B], input tokens of each sample."""
    images: Tensor
    """uint8[B, 3, S, S]"""


def samples_in_order(num_samples: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Return the samples at the positions start..stop of the endless training stream.

    The stream is one permutation of all samples after the other. An epoch's permutation depends on
    the seed and the epoch alone, so the order is the same for every batch size.

    Returns:
        int64[stop - start]
    """
    epochs = range(start // num_samples, -(-stop // num_samples))
    orders = [_epoch_order(num_samples, seed, epoch) for epoch in epochs]
    first = start - epochs.start * num_samples
    return np.concatenate(orders)[first : first + stop - start]


@lru_cache(maxsize=2)  # a batch lies in two epochs at most, unless it is larger than the data
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def image_buffer(samples: PreparedSamples, num_samples: int, pin_memory: bool = False) -> Tensor:
    """Return the memory for the images of a batch, uint8[num_samples, 3, S, S]; see `collate`.

    Args:
        pin_memory: for copies by the GPU itself.
    """
    shape = (num_samples, *samples.images.shape[1:])
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)


def collate(
    samples: PreparedSamples,
    indices: np.ndarray,
    num_text: int | None = None,
    buffer: Tensor | None = None,
) -> Batch:
    """Return the samples `indices` (int64[B]) as a batch.

    Args:
        num_text: M, more than the samples have; None takes one token of padding.
        buffer: of `image_buffer`, for at least B samples. The batch's images lie in it, so they
            last until the next batch that is given it. Fresh memory for each batch costs several
            times what reading the images does.
    """
    index = torch.from_numpy(indices)
    starts = samples.offsets[index]  # (B,)
    lengths = samples.text_lengths[index]
    num_real = int(lengths.sum())
    num_text = num_text or num_real + 1
    assert num_real < num_text, f"no padding among {num_text} tokens for texts of {num_real}"
    sample = torch.arange(len(index)).repeat_interleave(lengths)  # (num_real,) of each token
    columns = torch.arange(num_real) - (lengths.cumsum(0) - lengths)[sample]
    positions = starts[sample] + columns
    is_learnt = columns >= samples.prompt_lengths[index][sample] - 1
    token_ids = torch.zeros(num_text, dtype=torch.int64)
    token_ids[:num_real] = samples.tokens[positions]
    targets = torch.full((num_text,), IGNORED)
    targets[:num_real] = torch.where(is_learnt, samples.tokens[positions + 1].long(), IGNORED)
    return Batch(
        token_ids=token_ids,
        targets=targets,
        text_lengths=lengths,
        images=torch.index_select(
            samples.images,
            0,
            samples.image_index[index],
            out=None if buffer is None else buffer[: len(index)],
        ),
    )
