"""The shapes of batches: few different ones, so that code is compiled seldom.

They depend on the data alone, so what is compiled in one trial serves those with other seeds.
"""

import math
from typing import NamedTuple, Protocol, Self

import numpy as np
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.data.samples import PreparedSamples

DEVIATIONS = 4
"""How far from its mean the number of tokens or labels of a random batch may lie in the usual
shape: one batch in 30,000 lies beyond, if many samples make it nearly normal."""
MULTIPLE = 16
"""To which lengths are rounded up, since matrix units of GPUs like it."""


class BatchShape(NamedTuple):
    """What a batch is padded to; None leaves it as it is."""

    num_samples: int | None = None
    num_text: int | None = None
    """Text tokens of the row."""
    num_images: int | None = None
    padded_length: int | None = None
    """Of a sample in the padded view of `models/packing.py`."""
    num_labels: int | None = None


class Shapes(Protocol):
    """The shapes of batches of one set of samples."""

    def of_batch(self, indices: np.ndarray) -> BatchShape:
        """Return the shape of the samples `indices` (int64[B])."""


def choose_shapes(
    samples: PreparedSamples, config: VLMConfig, *, are_fixed: bool, has_fixed_labels: bool
) -> Shapes:
    """Return the shapes for batches of `samples`.

    Args:
        config: of the model that reads them.
        are_fixed: there are to be few.
        has_fixed_labels: the number of labels is part of them.
    """
    if config.traits.is_tiled:
        return TiledShapes(samples, config.num_image_tokens, are_fixed)
    if not are_fixed:
        return AsTheyAre()
    return FixedShapes(samples, config.num_image_tokens, has_fixed_labels)


class AsTheyAre:
    """No padding."""

    def of_batch(self, indices: np.ndarray) -> BatchShape:
        return BatchShape()


class FixedCount(NamedTuple):
    """What each sample has some of, and how many of them a batch gets room for."""

    mean: float
    """Of a sample."""
    deviation: float
    most: int

    @classmethod
    def of(cls, counts: Tensor) -> Self:
        """Return it for samples that have so many, int64[N]."""
        deviation = counts.double().std(correction=0).item()
        return cls(counts.double().mean().item(), deviation, int(counts.max()))

    def room(self, num_samples: int, num_real: int) -> int:
        """Return the room of a batch.

        Args:
            num_real: what its samples have together; less than the result.
        """
        spread = DEVIATIONS * self.deviation * math.sqrt(num_samples)
        most = num_samples * self.most
        usual = min(math.ceil(num_samples * self.mean + spread), most)
        return _round_up((usual if num_real <= usual else most) + 1)


class FixedShapes:
    """For samples of one image each: nearly always one shape for each number of samples."""

    def __init__(
        self, samples: PreparedSamples, num_image_tokens: int, has_fixed_labels: bool
    ) -> None:
        self._samples = samples
        self._text = FixedCount.of(samples.text_lengths)
        self._labels = FixedCount.of(samples.num_answer_tokens) if has_fixed_labels else None
        self._padded_length = _round_up(num_image_tokens + self._text.most)

    def of_batch(self, indices: np.ndarray) -> BatchShape:
        num_text = self._text.room(len(indices), int(self._samples.text_lengths[indices].sum()))
        num_labels = None
        if self._labels is not None:
            num_real = int(self._samples.num_answer_tokens[indices].sum())
            num_labels = self._labels.room(len(indices), num_real)
        return BatchShape(
            num_text=num_text, padded_length=self._padded_length, num_labels=num_labels
        )


class TiledShapes:
    """For samples of any number of images and lengths that differ widely.

    A batch is padded to the next step of a grid: samples to a power of two, the length of the
    longest and the number of images to one of a few steps in each doubling, and the row to a
    quarter of the padded view. Where samples of similar length go together, as
    `training/passes.py` arranges, about a tenth of a row is padding.
    """

    LENGTHS = 8
    """In each doubling."""
    IMAGES = 4
    ROWS = 4

    def __init__(self, samples: PreparedSamples, num_image_tokens: int, are_fixed: bool) -> None:
        """Know the samples.

        Args:
            are_fixed: False pads only where the model needs it.
        """
        self._samples, self._num_image_tokens = samples, num_image_tokens
        self._are_fixed = are_fixed

    def of_batch(self, indices: np.ndarray) -> BatchShape:
        counts = self._samples.slots.counts[indices]
        # At least one image: every parameter gets a gradient, and all workers send the same ones.
        num_images = max(1, int(counts.sum()))
        if not self._are_fixed:
            return BatchShape(num_images=num_images)
        lengths = self._samples.text_lengths[indices] + self._num_image_tokens * counts
        num_samples = 1 << (len(indices) - 1).bit_length()
        padded_length = _next_step(int(lengths.max()), self.LENGTHS)
        num_images = _next_step(num_images, self.IMAGES)
        num_of_images = num_images * self._num_image_tokens
        num_real = num_of_images + int(self._samples.text_lengths[indices].sum()) + 1
        part = _round_up(-(-num_samples * padded_length // self.ROWS))
        num_row = -(-num_real // part) * part
        return BatchShape(
            num_samples=num_samples,
            num_text=num_row - num_of_images,
            num_images=num_images,
            padded_length=padded_length,
        )


def _next_step(number: int, steps: int) -> int:
    """Return the next of the numbers that divide each doubling into `steps` equal parts."""
    step = max(1, (1 << (number - 1).bit_length()) // (2 * steps))
    return -(-number // step) * step


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
