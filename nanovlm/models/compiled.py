"""The blocks of the model as compiled code: compiled once for each shape, not once for each block.

A transformer's blocks differ in their weights alone, and to the compiler weights are inputs. So it
sees one block instead of 42, which takes seconds instead of minutes, and what it made serves every
model of the same shapes, in this trial and in those that follow.

Only training is compiled. Its batches have few shapes, known beforehand, and it is nearly all of a
trial's work; batches of an evaluation have many.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

RunBlock = Callable[..., Tensor]
"""Calls a block: `run(block, x, *further arguments)`."""

MAX_COMPILED = 256
"""Versions that a process may compile: one for each shape of a batch, and for each part that is
frozen. At torch's own limit of 8 later trials would go on uncompiled, with other rounding and less
speed."""


def run_block(block: nn.Module, *arguments: Any) -> Tensor:
    """Call `block`, uncompiled."""
    output: Tensor = block(*arguments)
    return output


def run_block_compiled(block: nn.Module, *arguments: Any) -> Tensor:
    """Call `block`: its compiled code where gradients are wanted."""
    run = _compiled_run_block() if torch.is_grad_enabled() else run_block
    return run(block, *arguments)


@cache
def _compiled_run_block() -> RunBlock:
    """Return `run_block` compiled, the same at every call."""
    # Never dynamic: code for changing shapes is made when a second shape comes, so the numbers of
    # a trial would depend on the trials before it.
    compiled: RunBlock = torch.compile(  # type: ignore[call-overload]  # no recompile_limit there
        run_block, dynamic=False, fullgraph=True, recompile_limit=MAX_COMPILED
    )
    return compiled
