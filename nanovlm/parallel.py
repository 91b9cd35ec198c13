"""Messages between the workers of one trial; with no process group a trial has one worker."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Workers that share this trial."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all workers, in one message.

    The tensors have one dtype and one device, and the same shapes on every worker.
    """
    if world_size() == 1:
        return
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(message)
    parts = message.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast_object(value: T) -> T:
    """Return rank 0's `value` on all workers; what the others pass is not used."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Return every worker's `value`, in the order of the ranks, on all workers."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
