"""How many samples pass through the model at once."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from nanovlm.config.schema import TrainConfig

logger = logging.getLogger(__name__)

CPU_PATCHES = 2048
"""Image patches of a pass on CPU, if the configuration leaves it open: 10 images at 224 pixels.
More are no faster, and a computer without the memory ends the program instead of telling it."""


class MicroBatchSize:
    """Samples of one forward and backward pass on this worker.

    A worker keeps it from trial to trial, so that memory runs out once and not in every trial.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None] = logger.warning) -> None:
        """Know nothing yet.

        Args:
            note: is told when the memory was not enough.
        """
        self._on_cpu = device.type == "cpu"
        self._limit: int | None = None
        self._note = note

    @property
    def limit(self) -> int | None:
        """Samples that have been found to fit, None before the memory was ever not enough."""
        return self._limit

    def restore(self, limit: int | None) -> None:
        """Take over what a worker before this one has found."""
        if limit is not None:
            self._limit = min(limit, self._limit or limit)

    def begin_trial(self) -> None:
        """Note what an earlier trial has found."""
        if self._limit is not None:
            self._note(f"out of GPU memory before: micro_batch_size {self._limit} at most")

    def split(self, indices: np.ndarray, config: TrainConfig) -> list[np.ndarray]:
        """Return this worker's samples of a step (int64[any]) in parts of nearly one size."""
        size = len(indices)
        if config.micro_batch_size != "auto":
            size = config.micro_batch_size
        elif self._limit is not None:
            size = self._limit
        elif self._on_cpu:
            size = max(1, CPU_PATCHES // config.vlm.num_patches)
        return np.array_split(indices, -(-len(indices) // size))

    def halve(self, indices: np.ndarray, config: TrainConfig) -> bool:
        """Take half of what `split` gives; return False if that cannot be.

        It cannot if the configuration says a size, or if it is one sample already.
        """
        size = max(map(len, self.split(indices, config)))
        if config.micro_batch_size != "auto" or size == 1:
            return False
        self._limit = -(-size // 2)
        self._note(f"out of GPU memory with micro_batch_size {size}: {self._limit} from now on")
        return True
