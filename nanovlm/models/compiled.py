"""The blocks of the model as compiled code: compiled once for each shape, not once for each block.

A transformer's blocks differ in their weights alone, and to the compiler weights are inputs. So it
sees one block instead of 42, which takes seconds instead of minutes, and what it made serves every
model of the same shapes, in this trial and in those that follow.

Only training is compiled. Its batches have few shapes, known beforehand, and it is nearly all of a
trial's work; batches of an evaluation have many.

Dropout is never compiled: to the compiler its probability is a constant, so each value that a
search tries would be compiled again. A block that drops something runs as compiled parts, with
dropout and attention, which drops too, in between. For equal shapes it draws the same numbers,
compiled or not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[..., Any]
"""Calls a function: `run(function, *arguments)`."""


class Block(Protocol):
    """A block of a transformer."""

    def drops(self) -> bool:
        """Return whether dropout takes part, which it does in training with a probability."""

    def __call__(self, *arguments: Any, run: Run = ...) -> Tensor:
        """Take the vectors of some tokens to those of the next block.

        Args:
            run: calls the parts of the block in which nothing is dropped.
        """


RunBlock = Callable[..., Tensor]
"""Calls a block: `run_block(block, x, *further arguments)`."""

MAX_COMPILED = 256
"""Versions of a function that a process keeps: one for each shape of a batch, and for each part
that is frozen. torch's own limit of 8 is soon passed by later trials. The limit on top of it,
`accumulated_recompile_limit`, is 256 too. A search over a range of batch sizes passes both."""


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, uncompiled."""
    return function(*arguments)


def run_block(block: Block, *arguments: Any) -> Tensor:
    """Call `block`, uncompiled."""
    return block(*arguments)


def run_block_compiled(block: Block, *arguments: Any) -> Tensor:
    """Call `block`: its compiled code where gradients are wanted."""
    if not torch.is_grad_enabled():
        return run_block(block, *arguments)
    if block.drops():
        return block(*arguments, run=call_compiled)
    output: Tensor = call_compiled(run_block, block, *arguments)
    return output


def call_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the compiled code of `function`, made for these shapes if there is none."""
    with _recompile_limit(MAX_COMPILED):
        try:
            return _compiled(function)(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            torch.compiler.reset()  # forget them all: what is still used comes back
            return _compiled(function)(*arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled, the same at every call."""
    # Never dynamic: code for changing shapes is made when a second shape comes, so the numbers of
    # a trial would depend on the trials before it.
    return torch.compile(function, dynamic=False, fullgraph=True)


@contextmanager
def _recompile_limit(limit: int) -> Iterator[None]:
    """Let torch compile up to `limit` versions of a function that is called in here.

    What the argument `recompile_limit` of torch.compile does, which torch 2.11 lacks.
    """
    # Not `config.patch`: in torch 2.13 each of its calls leaks a ContextVar.
    config = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = limit
    try:
        yield
    finally:
        config.recompile_limit = before


@cache
def find_compile_obstacle(device_type: str) -> str | None:
    """Return in one line why nothing can be compiled for this type of device, None if it can.

    Compiles x + 1, once in a process. Most of these seconds are the start of torch's compiler, for
    which the first model would have to wait anyway.
    """
    # Imported late: they take a second that a program without compilation need not wait.
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    x = torch.zeros(8, device=device_type)
    try:
        torch.compile(_add_one)(x)
    except (TritonMissing, GPUTooOldForTriton) as error:
        return _cause(error)
    except BackendCompilerFailed as error:  # of any kind: a model would meet it too
        return _cause(error.inner_exception)
    return None


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _cause(error: Exception) -> str:
    """Return what is wrong in one line: in the compiler's own words, if it was one that failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    in_short = f"{type(error).__name__}: {next(filter(None, lines), '')}"
    return next((line for line in lines if "error:" in line), in_short)
