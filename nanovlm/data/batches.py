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


def collate(samples: PreparedSamples, indices: np.ndarray, pad_multiple: int = 8) -> Batch:
    """Return the samples `indices` (int64[B]) as a batch.

    T is the longest text without its EOS, which nothing follows, rounded up to `pad_multiple`.
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
        images=samples.images[samples.image_index[index]],
        targets=torch.where(is_learnt, samples.tokens[places + 1].long(), IGNORED),
    )


def count_answer_tokens(samples: PreparedSamples, indices: np.ndarray) -> int:
    """Return how many tokens of the samples `indices` are learnt, EOS included."""
    index = torch.from_numpy(indices)
    lengths = samples.offsets[index + 1] - samples.offsets[index]
    return int((lengths - samples.prompt_lengths[index]).sum())
