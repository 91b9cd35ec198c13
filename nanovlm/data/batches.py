"""The order of the samples, and batches of them as tensors."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovlm.data.prepared import PreparedSamples

IGNORED = -100
"""The target of a token that carries no label; what cross-entropy leaves out by default."""


class Batch(NamedTuple):
    """B samples, their texts padded on the right to one length T."""

    input_ids: Tensor
    """int64[B, T]. The padding needs no mask: what comes before it never looks at it."""
    images: Tensor
    """uint8[B, 3, S, S]"""
    targets: Tensor
    """int64[B, T], the token that follows each input token where that is learnt, else -100."""


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


def image_buffer(samples: PreparedSamples, num_samples: int) -> Tensor:
    """Return the memory for the images of a batch, uint8[num_samples, 3, S, S]; see `collate`."""
    return samples.images.new_empty((num_samples, *samples.images.shape[1:]))


def collate(
    samples: PreparedSamples,
    indices: np.ndarray,
    pad_multiple: int = 8,
    buffer: Tensor | None = None,
) -> Batch:
    """Return the samples `indices` (int64[B]) as a batch.

    T is the longest text without its EOS, which nothing follows, rounded up to `pad_multiple`.

    Args:
        buffer: of `image_buffer`, for at least B samples. The batch's images lie in it, so they
            last until the next batch that is given it. Fresh memory for each batch costs several
            times what reading the images does.
    """
    index = torch.from_numpy(indices)
    starts = samples.offsets[index, None]  # (B, 1)
    lengths = samples.offsets[index + 1, None] - starts - 1
    prompt_lengths = samples.prompt_lengths[index, None]
    longest = int(lengths.max())
    columns = torch.arange(-(-longest // pad_multiple) * pad_multiple)  # (T,)
    is_input = columns < lengths  # (B, T)
    is_learnt = is_input & (columns >= prompt_lengths - 1)
    places = torch.where(is_input, starts + columns, 0)
    return Batch(
        input_ids=torch.where(is_input, samples.tokens[places].long(), 0),
        images=torch.index_select(
            samples.images,
            0,
            samples.image_index[index],
            out=None if buffer is None else buffer[: len(index)],
        ),
        targets=torch.where(is_learnt, samples.tokens[places + 1].long(), IGNORED),
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
