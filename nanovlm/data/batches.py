"""The order of the samples, and batches of them as tensors."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovlm.data.tensors import PreparedSamples
from nanovlm.errors import UserError

IGNORED = -100
"""The target of a token that carries no label; what cross-entropy leaves out by default."""


class Batch(NamedTuple):
    """B samples, their texts one behind the other in M tokens; the last one or more are spare."""

    token_ids: Tensor
    """int64[M], without the EOS of each sample, which nothing follows; 0 where spare."""
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
        pin_memory: a GPU shall copy from it by itself.
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
        num_text: M, more than the samples have; None takes one spare token.
        buffer: of `image_buffer`, for at least B samples. The batch's images lie in it, so they
            last until the next batch that is given it. Fresh memory for each batch costs several
            times what reading the images does.
    """
    index = torch.from_numpy(indices)
    starts = samples.offsets[index]  # (B,)
    lengths = samples.offsets[index + 1] - starts - 1
    num_real = int(lengths.sum())
    num_text = num_text or num_real + 1
    assert num_real < num_text, f"no spare token among {num_text} for texts of {num_real}"
    sample = torch.arange(len(index)).repeat_interleave(lengths)  # (num_real,) of each token
    columns = torch.arange(num_real) - (lengths.cumsum(0) - lengths)[sample]
    places = starts[sample] + columns
    is_learnt = columns >= samples.prompt_lengths[index][sample] - 1
    token_ids = torch.zeros(num_text, dtype=torch.int64)
    token_ids[:num_real] = samples.tokens[places]
    targets = torch.full((num_text,), IGNORED)
    targets[:num_real] = torch.where(is_learnt, samples.tokens[places + 1].long(), IGNORED)
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


def check_lengths(samples: PreparedSamples, max_length: int) -> None:
    """Raise UserError if a sample has more tokens of text than `max_length`; it names the first."""
    lengths = samples.offsets.diff()
    too_long = (lengths > max_length).nonzero()
    if len(too_long):
        first = int(too_long[0])
        raise UserError(
            f"sample {first}: its text must be at most vlm.lm_max_length={max_length} tokens, "
            f"got {int(lengths[first])} ({len(too_long)} of {len(lengths)} samples are too long)"
        )


def text_lengths(samples: PreparedSamples, indices: np.ndarray) -> np.ndarray:
    """Return how many text tokens each of the samples `indices` is read with, int64[B].

    All but the EOS, which nothing follows.
    """
    index = torch.from_numpy(indices)
    return (samples.offsets[index + 1] - samples.offsets[index] - 1).numpy()


def count_answer_tokens(samples: PreparedSamples, indices: np.ndarray) -> int:
    """Return how many tokens of the samples `indices` are learnt, EOS included."""
    index = torch.from_numpy(indices)
    lengths = samples.offsets[index + 1] - samples.offsets[index]
    return int((lengths - samples.prompt_lengths[index]).sum())
