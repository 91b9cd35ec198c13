"""The blocks of the model as compiled code: compiled once for each shape, not once for each block.

A transformer's blocks differ in their weights alone, and to the compiler weights are inputs. So it
sees one block instead of 42, which takes seconds instead of minutes, and what it made serves every
model of the same shapes, in this trial and in those that follow.

Only training is compiled. Its batches have few shapes, known beforehand, and it is nearly all of a
trial's work; batches of an evaluation have many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

RunBlock = Callable[..., Tensor]
"""Calls a block: `run(block, x, *further arguments)`."""

MAX_COMPILED = 256
"""Versions that a process may compile: one for each shape of a batch, and for each part that is
frozen. torch's own limit of 8 is soon passed by later trials, and an error then. The limit on top
of it, `accumulated_recompile_limit`, is 256 too."""


def run_block(block: nn.Module, *arguments: Any) -> Tensor:
    """Call `block`, uncompiled."""
    output: Tensor = block(*arguments)
    return output


def run_block_compiled(block: nn.Module, *arguments: Any) -> Tensor:
    """Call `block`: its compiled code where gradients are wanted."""
    if not torch.is_grad_enabled():
        return run_block(block, *arguments)
    with _recompile_limit(MAX_COMPILED):
        return _compiled_run_block()(block, *arguments)


@cache
def _compiled_run_block() -> RunBlock:
    """Return `run_block` compiled, the same at every call."""
    # Never dynamic: code for changing shapes is made when a second shape comes, so the numbers of
    # a trial would depend on the trials before it.
    return torch.compile(run_block, dynamic=False, fullgraph=True)


@contextmanager
def _recompile_limit(limit: int) -> Iterator[None]:
    """Let torch compile up to `limit` versions of a function that is called in here.

    What the argument `recompile_limit` of torch.compile does, which torch 2.11 has not.
    """
    # Not `config.patch`: in torch 2.13 each of its calls leaves a ContextVar behind for good.
    config = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = limit
    try:
        yield
    finally:
        config.recompile_limit = before
