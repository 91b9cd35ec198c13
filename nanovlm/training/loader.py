"""Batches on their way from prepared data to the device.

The host runs ahead of a GPU: while the GPU computes one batch, the next is collated into pinned
memory and copied on a stream of its own. There is no loader process; to collate 256 images takes a
few milliseconds, since they are decoded already and lie in memory that all processes share.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.data.samples import PreparedSamples, collate, image_buffer
from nanovlm.training.forward import ModelInput, model_input
from nanovlm.training.shapes import choose_shapes


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
        self._shapes = choose_shapes(
            samples, config, are_fixed=has_fixed_shapes, has_fixed_labels=has_fixed_labels
        )
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
        shape = self._shapes.of_batch(indices)
        num_images = shape.num_images or int(self._samples.slots.counts[indices].sum())
        batch = collate(
            self._samples,
            indices,
            shape.num_text,
            num_images,
            shape.num_samples,
            self._memory(num_images),
        )
        inputs = model_input(batch, self._config, shape.padded_length, shape.num_labels)
        if self._stream is None:
            return inputs
        with torch.cuda.stream(self._stream):
            copied = inputs.apply(self._copy)
        # After the work that is queued on the device, so that a wait can be measured.
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._stream)
        return copied.apply(lambda tensor: _used_by(stream, tensor))

    def _copy(self, tensor: Tensor) -> Tensor:
        """Begin to copy to the GPU; the host does not wait for the end."""
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _memory(self, num_images: int) -> Tensor:
        """Return where the images are put."""
        if self._stream is not None:
            # Torch gives out pinned memory again only when the copies from it are done.
            return image_buffer(self._samples, num_images, pin_memory=True)
        if len(self._buffer) < num_images:
            self._buffer = image_buffer(self._samples, num_images)
        return self._buffer


def _used_by(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Return the tensor; its memory is not given out again before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor
