"""A model's weights kept in memory, so that the next trial starts without reading a file."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn


class Snapshot:
    """Copies of the tensors of some parts of a model, on its device; nothing is shared with it."""

    def __init__(self, model: nn.Module, parts: Sequence[str]) -> None:
        """Copy what `model` holds now.

        Args:
            parts: names of submodules of `model`.
        """
        # Not the state dict: it would hold a tied head a second time.
        self._tensors = {
            part: [tensor.detach().clone() for tensor in _tensors(model, part)] for part in parts
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copy the tensors back, in place, to `model` or another one of the same architecture."""
        for part, tensors in self._tensors.items():
            for place, tensor in zip(_tensors(model, part), tensors, strict=True):
                place.copy_(tensor)


def _tensors(model: nn.Module, part: str) -> chain[torch.Tensor]:
    module = model.get_submodule(part)
    return chain(module.parameters(), module.buffers())
