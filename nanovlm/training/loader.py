"""Batches on their way from prepared data to the device.

The host runs ahead of a GPU: while the GPU computes one batch, the next is collated into pinned
memory and copied on a stream of its own. There is no loader process; to collate 256 images takes a
few milliseconds, since they are decoded already and lie in memory that all processes share.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.data.samples import PreparedSamples, collate, image_buffer
from nanovlm.training.forward import ModelInput, model_input


class Loader:
    """Brings samples to the device."""

    def __init__(
        self,
        samples: PreparedSamples,
        config: VLMConfig,
        device: torch.device,
        *,
        has_fixed_shapes: bool = False,
        has_fixed_labels: bool = False,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Bring nothing yet.

        Args:
            config: of the model that reads them.
            has_fixed_shapes: batches are padded, so that they have few different shapes.
            has_fixed_labels: their labels are padded too.
            waiting: a context in which each batch is brought, such as `Meter.waiting`.
        """
        self._samples, self._config = samples, config
        self._shapes = FixedShapes.of(samples) if has_fixed_shapes else None
        self._has_fixed_labels = has_fixed_labels
        self._device = device
        self._waiting = waiting
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = image_buffer(samples, 0)
        self._ahead: tuple[np.ndarray, ModelInput] | None = None

    def fetch(self, indices: np.ndarray) -> None:
        """Begin to bring the samples `indices` (int64[B]), which are taken next."""
        with self._waiting():
            self._ahead = indices, self._load(indices)

    def take(self, indices: np.ndarray) -> ModelInput:
        """Return the samples `indices` (int64[B]) on the device.

        On CPU they last until the next ones are fetched or taken.
        """
        ahead, self._ahead = self._ahead, None
        is_there = ahead is not None and np.array_equal(ahead[0], indices)
        if ahead is not None and is_there:
            return ahead[1]
        with self._waiting():
            return self._load(indices)

    def _load(self, indices: np.ndarray) -> ModelInput:
        num_text, padded_length, num_labels = self._shape(indices)
        batch = collate(self._samples, indices, num_text, self._memory(len(indices)))
        inputs = model_input(batch, self._config, padded_length, num_labels)
        if self._stream is None:
            return inputs
        with torch.cuda.stream(self._stream):
            copied = inputs.apply(self._copy)
        # After the work that is queued on the device, so that a wait can be measured.
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._stream)
        return copied.apply(lambda tensor: _used_by(stream, tensor))

    def _shape(self, indices: np.ndarray) -> tuple[int | None, int | None, int | None]:
        """Return the text tokens of the row, the padded length and the labels, where fixed."""
        num_text = padded_length = num_labels = None
        if self._shapes is not None:
            num_real = int(self._samples.text_lengths[indices].sum())
            num_text = self._shapes.text.room(len(indices), num_real)
            padded_length = self._shapes.padded_length(self._config.num_image_tokens)
            if self._has_fixed_labels:
                num_real = int(self._samples.num_answer_tokens[indices].sum())
                num_labels = self._shapes.labels.room(len(indices), num_real)
        return num_text, padded_length, num_labels

    def _copy(self, tensor: Tensor) -> Tensor:
        """Begin to copy to the GPU; the host does not wait for the end."""
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _memory(self, num_samples: int) -> Tensor:
        """Return where the images are put."""
        if self._stream is not None:
            # Torch gives out pinned memory again only when the copies from it are done.
            return image_buffer(self._samples, num_samples, pin_memory=True)
        if len(self._buffer) < num_samples:
            self._buffer = image_buffer(self._samples, num_samples)
        return self._buffer


def _used_by(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Return the tensor; its memory is not given out again before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor


DEVIATIONS = 4
"""How far from its mean the number of tokens or labels of a random batch may lie in the usual
shape: one batch in 30,000 lies beyond, if many samples make it nearly normal."""
MULTIPLE = 16
"""To which lengths are rounded up, since matrix units of GPUs like it."""


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


class FixedShapes(NamedTuple):
    """The shapes of batches of one set of samples: nearly always one for each number of samples.

    They depend on the data alone, so what is compiled in one trial serves those with other seeds.
    """

    text: FixedCount
    """Tokens of the text; the EOS is not read."""
    labels: FixedCount

    @classmethod
    def of(cls, samples: PreparedSamples) -> Self:
        """Return the shapes for batches of `samples`."""
        return cls(FixedCount.of(samples.text_lengths), FixedCount.of(samples.num_answer_tokens))

    def padded_length(self, num_image_tokens: int) -> int:
        """Return how many tokens a sequence of the padded view gets."""
        return _round_up(num_image_tokens + self.text.most)


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
