"""The samples of an optimizer step in forward and backward passes that the memory has room for."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanovlm.config.schema import TrainConfig, VLMConfig

logger = logging.getLogger(__name__)

CPU_PATCHES = 2048
"""Image patches of a pass on CPU, if the configuration leaves it open: 10 images at 224 pixels.
More are no faster, and a computer without the memory ends the program without a message."""

TILED_COSTS = {"cpu": 4096, "cuda": 65_536}
"""What a pass of tiled images costs at most before memory has ever run out, as `sample_costs`
counts, by the kind of device: on a GPU 60 tiles of 512 pixels."""


def costs_of(text_lengths: Tensor, num_images: Tensor, config: VLMConfig) -> np.ndarray:
    """Return what each sample costs in time and memory, about: int64[N].

    The patches that the vision encoder reads of it, and the tokens that the decoder does.
    """
    costs = text_lengths + num_images * (config.num_image_tokens + config.num_patches)
    return np.asarray(costs)


def in_groups(ordered: np.ndarray, costs: np.ndarray, most: int) -> list[np.ndarray]:
    """Return samples (int64[B]) in consecutive groups, each of which costs at most `most`.

    A sample that costs more stands alone.

    Args:
        costs: of each of them, int64[B].
    """
    groups: list[np.ndarray] = []
    start = total = 0
    for number, cost in enumerate(costs.tolist()):
        if total + cost > most and number > start:
            groups.append(ordered[start:number])
            start, total = number, 0
        total += cost
    return [*groups, ordered[start:]]


def evaluation_batches(
    text_lengths: Tensor, num_images: Tensor, config: VLMConfig, device: torch.device
) -> list[np.ndarray]:
    """Return N samples of tiled images in batches for an evaluation, those of like costs together.

    Args:
        text_lengths: int64[N]
        num_images: int64[N], the tiles of each sample.
    """
    costs = costs_of(text_lengths, num_images, config)
    order = np.argsort(-costs, kind="stable")
    return in_groups(order, costs[order], TILED_COSTS[device.type])


class MicroBatchSize:
    """How much one forward and backward pass on this worker takes.

    A worker keeps it from trial to trial, so that memory runs out once and not in every trial.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None] = logger.warning) -> None:
        """Know nothing yet.

        Args:
            note: called with a text when the memory was not enough.
        """
        self._device_type = device.type
        self._limit: int | None = None
        self._note = note

    @property
    def limit(self) -> int | None:
        """What has been found to fit: samples, or their costs where images are tiled; None before
        the memory was ever not enough."""
        return self._limit

    def restore(self, limit: int | None) -> None:
        """Take over what a worker before this one has found."""
        if limit is not None:
            self._limit = min(limit, self._limit or limit)

    def begin_trial(self) -> None:
        """Note what an earlier trial has found."""
        if self._limit is not None:
            self._note(f"out of GPU memory before: micro_batch_size {self._limit} at most")

    def split(
        self, indices: np.ndarray, config: TrainConfig, costs: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return this worker's samples of a step (int64[any]) in passes, in their order.

        Args:
            costs: of each sample, where they differ; else passes are of nearly one size.
        """
        size = len(indices)
        if config.micro_batch_size != "auto":
            size = config.micro_batch_size
        elif costs is not None:
            return in_groups(indices, costs, self._limit or TILED_COSTS[self._device_type])
        elif self._limit is not None:
            size = self._limit
        elif self._device_type == "cpu":
            size = max(1, CPU_PATCHES // config.vlm.num_patches)
        return np.array_split(indices, -(-len(indices) // size))

    def halve(
        self, indices: np.ndarray, config: TrainConfig, costs: np.ndarray | None = None
    ) -> bool:
        """Take half of what `split` gives; return False if that cannot be.

        It cannot if the configuration sets a size, or if it is one sample already.
        """
        passes = self.split(indices, config, costs)
        size = max(map(len, passes))
        if config.micro_batch_size != "auto" or size == 1:
            return False
        unit = ""
        if costs is not None:
            ends = np.cumsum([len(part) for part in passes])
            parts = np.split(costs, ends[:-1])
            size = max(int(part.sum()) for part in parts if len(part) > 1)
            unit = " patches and tokens"
        self._limit = -(-size // 2)
        self._note(
            f"out of GPU memory with micro_batch_size {size}{unit}: {self._limit} from now on"
        )
        return True
