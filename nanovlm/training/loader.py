"""The way of the batches from prepared data to the device.

The host runs ahead of a GPU: while the GPU computes one batch, the next is collated into pinned
memory and copied on a stream of its own. There is no loader process; to collate 256 images takes a
few milliseconds, since they are decoded already and lie in memory that all processes share.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from nanovlm.data.batches import collate, image_buffer
from nanovlm.data.tensors import PreparedSamples
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import ModelInput, model_input

LINE_MULTIPLE = 32
"""Lines of the padded view have few different lengths where the code is compiled for each."""


class Loader:
    """Brings samples to the device of a model."""

    def __init__(
        self,
        samples: PreparedSamples,
        model: VisionLanguageModel,
        device: torch.device,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Bring nothing yet.

        Args:
            waiting: a context in which each batch is brought, such as `Meter.waiting`.
        """
        self._samples = samples
        self._config, self._compiled = model.config, model.compiled
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
        text_multiple = row_multiple(len(indices)) if self._compiled else 1
        line_multiple = LINE_MULTIPLE if self._compiled else 1
        batch = collate(self._samples, indices, text_multiple, self._memory(len(indices)))
        inputs = model_input(batch, self._config, line_multiple)
        if self._stream is None:
            return inputs
        with torch.cuda.stream(self._stream):
            copied = inputs.apply(self._copy)
        # Told now, behind the work that the device still has, so that a wait can be measured.
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._stream)
        return copied.apply(lambda tensor: _used_by(stream, tensor))

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


def row_multiple(num_samples: int) -> int:
    """Return the multiple to which the text tokens of so many samples are rounded up.

    The tokens of random samples spread as the square root of their number; a power of two of that
    order leaves a handful of different lengths, for a few spare tokens in a hundred.
    """
    return int(16 * 2 ** math.ceil(math.log2(math.sqrt(num_samples))))
