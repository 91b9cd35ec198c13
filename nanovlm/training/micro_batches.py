"""How many samples pass through the model at once."""

import logging

import numpy as np

from nanovlm.config import TrainConfig

logger = logging.getLogger(__name__)


class MicroBatchSize:
    """Samples of one forward and backward pass on this worker.

    A worker keeps it from trial to trial, so that memory runs out once and not in every trial.
    """

    def __init__(self) -> None:
        self._limit: int | None = None

    def split(self, indices: np.ndarray, config: TrainConfig) -> list[np.ndarray]:
        """Return this worker's samples of a step (int64[any]) in parts of nearly one size."""
        size = len(indices)
        if config.micro_batch_size != "auto":
            size = config.micro_batch_size
        elif self._limit is not None:
            size = self._limit
        return np.array_split(indices, -(-len(indices) // size))

    def halve(self, indices: np.ndarray, config: TrainConfig) -> bool:
        """Take half of what `split` gives; return False if that cannot be.

        It cannot if the configuration says a size, or if it is one sample already.
        """
        size = max(map(len, self.split(indices, config)))
        if config.micro_batch_size != "auto" or size == 1:
            return False
        self._limit = -(-size // 2)
        logger.warning(
            "out of GPU memory with %d samples at once: %d from now on", size, self._limit
        )
        return True
