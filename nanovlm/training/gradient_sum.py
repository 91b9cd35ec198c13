"""The gradients of a step, summed over the workers while the backward pass still runs.

    gradients = GradientSum(parameters)
    for step in ...:
        gradients.clear()
        for micro_batch in ...:
            loss = ...
            with gradients.sending() if ... else nullcontext():  # in the last pass
                loss.backward()
        gradients.finish()

As DistributedDataParallel does, but no worker hangs if the pass of another one breaks off: `finish`
sends what the pass has not, so every worker sends the same messages in the same order, whatever
happened to its own passes. The workers then have to agree on whether the sums are valid.

The gradients lie in the messages' own memory, and that is allocated once: there is no second copy,
and a worker whose memory has run out has what it needs to take part.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm.parallel import world_size

BUCKET_BYTES = 25 * 2**20
"""Of a message, nearly: large enough for the network, small enough that the last is soon over."""


class GradientSum:
    """The gradients of some parameters and their sums over all workers.

    With one worker there is nothing to send: gradients are allocated by the backward pass, unless
    they need fixed memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], has_fixed_memory: bool = False) -> None:
        """Allocate the gradients.

        Args:
            parameters: those that want a gradient, on one device and of one dtype, in the order of
                the forward pass; the same on all workers.
            has_fixed_memory: with one worker too each gradient always has the same memory.
        """
        self._parameters = list(parameters)
        for parameter in self._parameters:
            parameter.grad = None  # what an earlier trial has left, so that there is room
        self._buckets: list[_Bucket] = []
        self._sent: list[dist.Work] = []
        self._are_sent = world_size() > 1
        if self._are_sent or has_fixed_memory:
            parts = _parts(reversed(self._parameters))  # gradients come in this order
            self._buckets = [_Bucket(part) for part in parts]

    def clear(self) -> None:
        """Begin a step, or begin it again: all gradients are 0, or None without fixed memory."""
        self._sent.clear()
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.clear()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Return the context of a step's last backward pass: complete buckets are sent."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._send_ready, bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
            if self._are_sent
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Make each gradient the sum of all workers' gradients. All workers call this.

        On a GPU the stream waits, and not the host. A parameter that the passes of a worker did not
        use counts as 0 there.
        """
        while self._are_sent and len(self._sent) < len(self._buckets):
            self._send_next()
        for work in self._sent:
            work.wait()

    def _send_ready(self, bucket: "_Bucket", parameter: Tensor) -> None:
        """Send what can be sent now that the gradient of one more parameter of `bucket` is there.

        Never a bucket before those that precede it: the order must be that of the other workers.
        """
        bucket.num_missing -= 1
        while len(self._sent) < len(self._buckets):
            if self._buckets[len(self._sent)].num_missing > 0:
                return
            self._send_next()

    def _send_next(self) -> None:
        memory = self._buckets[len(self._sent)].memory
        self._sent.append(dist.all_reduce(memory, async_op=True))


class _Bucket:
    """The gradients that travel in one message."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self.memory = torch.zeros(
            sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self._views = self.memory.split(sizes)
        self.num_missing = len(parameters)

    def clear(self) -> None:
        """Let the parameters' gradients be 0, in this memory."""
        self.memory.zero_()
        self.num_missing = len(self.parameters)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view.view_as(parameter)


def _parts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cut into parts of at most BUCKET_BYTES; a parameter that is larger is a part by itself."""
    part: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        if part and num_bytes + parameter.nbytes > BUCKET_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(parameter)
        num_bytes += parameter.nbytes
    if part:
        yield part
