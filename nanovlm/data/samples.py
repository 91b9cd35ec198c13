"""Training samples as tensors, their order, and batches of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target of a token that carries no label; what cross-entropy leaves out by default."""


@dataclass(frozen=True, eq=False)
class ImageSlots:
    """The images of N samples and where they stand: sample i has the slots from `offsets[i]` to
    `offsets[i + 1]`, K in all."""

    index: Tensor
    """int64[K], the image in each slot."""
    offsets: Tensor
    """int64[N + 1]"""
    places: Tensor
    """int64[K], how many text tokens of the sample stand before the slot; never fewer than before
    the slot in front of it."""

    @classmethod
    def one_each(cls, index: Tensor) -> Self:
        """Return the slots of samples that each begin with one image, int64[N]."""
        return cls(
            index, torch.arange(len(index) + 1), torch.zeros_like(index[:1]).expand_as(index)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def counts(self) -> Tensor:
        """int64[N], the images of each sample."""
        return self.offsets.diff()

    def part(self, start: int, stop: int) -> "ImageSlots":
        """Return those of consecutive samples; nothing is copied."""
        return replace(self, offsets=self.offsets[start : stop + 1])

    def take(self, samples: Tensor) -> "ImageSlots":
        """Return those of the samples `samples` (int64[B])."""
        counts = self.counts[samples]
        ends = counts.cumsum(0)
        slots = (self.offsets[samples] - (ends - counts)).repeat_interleave(counts)
        slots += torch.arange(len(slots))
        return ImageSlots(self.index[slots], F.pad(ends, (1, 0)), self.places[slots])


@dataclass(frozen=True, eq=False)
class Mixture:
    """How often an epoch has each sample: by sub-set, so many times."""

    members: tuple[np.ndarray, ...]
    """int64[any], the samples of each sub-set."""
    weights: tuple[float, ...]
    """Of each sub-set; what is left of a whole number goes to another random part in each epoch."""

    @cached_property
    def epoch_size(self) -> int:
        """The samples of an epoch, the same in all epochs."""
        return sum(
            math.floor(weight) * len(own) + self._num_drawn(own, weight) for own, weight in self
        )

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        return zip(self.members, self.weights, strict=True)

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return the samples of an epoch, ascending: int64[epoch_size]."""
        parts = [np.repeat(own, math.floor(weight)) for own, weight in self]
        parts += [
            rng.permutation(own)[: self._num_drawn(own, weight)]
            for own, weight in self
            if weight % 1
        ]
        return np.sort(np.concatenate(parts))

    @staticmethod
    def _num_drawn(own: np.ndarray, weight: float) -> int:
        return round(weight % 1 * len(own))


@dataclass(frozen=True, eq=False)
class PreparedSamples:
    """N samples: texts with some of R images in them.

    Sample i has the text tokens `tokens[offsets[i] : offsets[i + 1]]`: of which the last is learnt
    and never read. The tensors are files mapped into memory: to write to one ends the process.
    """

    images: Tensor
    """uint8[R, 3, S, S], or what a frozen vision encoder makes of them, float[R, N, D]."""
    slots: ImageSlots
    tokens: Tensor
    """int32[all tokens], one sample after the other."""
    offsets: Tensor
    """int64[N + 1]"""
    prompt_lengths: Tensor
    """int64[N], tokens of each prompt, before the first that is learnt."""
    is_learnt: Tensor | None = None
    """bool[all tokens], which tokens are learnt; None where it is all after the prompt."""
    mixture: Mixture | None = None
    """None has each sample once in an epoch."""

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def epoch_size(self) -> int:
        """The samples of an epoch."""
        return len(self) if self.mixture is None else self.mixture.epoch_size

    @cached_property
    def text_lengths(self) -> Tensor:
        """int64[N], text tokens that the model reads of each sample: all but the last."""
        return self.offsets.diff() - 1

    @cached_property
    def num_answer_tokens(self) -> Tensor:
        """int64[N], tokens of each sample that are learnt."""
        if self.is_learnt is None:
            return self.offsets.diff() - self.prompt_lengths
        first, end = int(self.offsets[0]), int(self.offsets[-1])
        starts = (self.offsets[:-1] - first).numpy()
        is_learnt = self.is_learnt[first:end].numpy()
        return torch.from_numpy(np.add.reduceat(is_learnt, starts, dtype=np.int64))


class Batch(NamedTuple):
    """B samples, their texts one after the other in M tokens; the last one or more are padding."""

    token_ids: Tensor
    """int64[M], without the last of each sample, which nothing follows; 0 for padding."""
    targets: Tensor
    """int64[M], the token that follows each input token where that is learnt, else -100."""
    text_lengths: Tensor
    """int64[B], input tokens of each sample."""
    images: Tensor
    """uint8[K, 3, S, S], the samples' images, then padding."""
    slots: ImageSlots
    """Of the B samples."""


def samples_in_order(
    num_samples: int, seed: int, start: int, stop: int, mixture: Mixture | None = None
) -> np.ndarray:
    """Return the samples at the positions start..stop of the endless training stream.

    The stream is one permutation of an epoch's samples after the other. It depends on the seed and
    the epoch alone, so the order is the same for every batch size.

    Args:
        num_samples: in all, each once in an epoch if there is no mixture.

    Returns:
        int64[stop - start]
    """
    size = num_samples if mixture is None else mixture.epoch_size
    epochs = range(start // size, -(-stop // size))
    orders = [_epoch_order(num_samples, seed, epoch, mixture) for epoch in epochs]
    first = start - epochs.start * size
    return np.concatenate(orders)[first : first + stop - start]


@lru_cache(maxsize=2)  # a batch lies in two epochs at most, unless it is larger than the data
def _epoch_order(num_samples: int, seed: int, epoch: int, mixture: Mixture | None) -> np.ndarray:
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_samples if mixture is None else mixture.epoch(rng))


def image_buffer(samples: PreparedSamples, num_images: int, pin_memory: bool = False) -> Tensor:
    """Return the memory for the images of a batch, as many of them; see `collate`.

    Args:
        pin_memory: for copies by the GPU itself.
    """
    shape = (num_images, *samples.images.shape[1:])
    return torch.empty(shape, dtype=samples.images.dtype, pin_memory=pin_memory)


def collate(
    samples: PreparedSamples,
    indices: np.ndarray,
    num_text: int | None = None,
    num_images: int | None = None,
    num_samples: int | None = None,
    buffer: Tensor | None = None,
) -> Batch:
    """Return the samples `indices` (int64[B]) as a batch.

    Args:
        num_text: M, more than the samples have; None takes one token of padding.
        num_images: K, at least as many as they have; None takes these.
        num_samples: of the batch, at least B; what is missing is empty. None takes B.
        buffer: of `image_buffer`, for at least K images. The batch's images lie in it, so they
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
    if samples.is_learnt is None:
        is_learnt = columns >= samples.prompt_lengths[index][sample] - 1
    else:
        is_learnt = samples.is_learnt[positions + 1]
    token_ids = torch.zeros(num_text, dtype=torch.int64)
    token_ids[:num_real] = samples.tokens[positions]
    targets = torch.full((num_text,), IGNORED)
    targets[:num_real] = torch.where(is_learnt, samples.tokens[positions + 1].long(), IGNORED)
    slots = samples.slots.take(index)
    num_empty = 0 if num_samples is None else num_samples - len(index)
    return Batch(
        token_ids=token_ids,
        targets=targets,
        text_lengths=F.pad(lengths, (0, num_empty)),
        images=_images(samples.images, slots.index, num_images, buffer),
        slots=replace(slots, offsets=F.pad(slots.offsets, (0, num_empty), value=len(slots.index))),
    )


def _images(images: Tensor, index: Tensor, num_images: int | None, buffer: Tensor | None) -> Tensor:
    """Return the images `index` (int64[n]), and zeros up to `num_images`; in `buffer` if given."""
    number = len(index) if num_images is None else num_images
    if buffer is None:
        buffer = images.new_empty((number, *images.shape[1:]))
    torch.index_select(images, 0, index, out=buffer[: len(index)])
    buffer[len(index) : number] = 0
    return buffer[:number]
