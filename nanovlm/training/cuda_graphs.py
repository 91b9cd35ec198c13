"""Forward and backward passes that a GPU runs after a single launch.

A pass of nanoVLM-222M launches 2,800 kernels, and to launch them takes the host longer than the GPU
needs to compute a small batch. As a CUDA graph they are launched once, and replayed for each batch
of the same shapes: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanovlm.training.forward import ModelInput

Pass = Callable[[ModelInput, Tensor], Tensor]
"""Takes a batch and a number, float32[]; returns one, and adds to gradients in fixed memory."""

Replay = Callable[[], Tensor]
"""Computes again, from what the inputs' memory holds by then."""


class RecordedPasses:
    """A pass that is recorded for each shape of its inputs when that comes for the second time.

    The first time it runs unrecorded, so that first calls can allocate and compile. Each recording
    keeps its memory; all of them share it, since they run one after the other.
    """

    def __init__(self, run: Pass, record: Callable[[Replay], Replay] | None = None) -> None:
        """Record nothing yet.

        Args:
            record: takes a computation to its recording; None makes CUDA graphs.
        """
        self._run = run
        self._record = record or GraphRecorder()
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._recorded: dict[tuple[torch.Size, ...], tuple[list[Tensor], Replay]] = {}

    def __call__(self, inputs: ModelInput, number: Tensor) -> Tensor:
        given = [*inputs.tensors(), number]
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self._seen:
            self._seen.add(shapes)
            return self._run(inputs, number)
        if shapes not in self._recorded:
            run, fixed, fixed_number = self._run, inputs.apply(torch.clone), number.clone()
            replay = self._record(lambda: run(fixed, fixed_number))
            self._recorded[shapes] = [*fixed.tensors(), fixed_number], replay
        memory, replay = self._recorded[shapes]
        for recorded, tensor in zip(memory, given, strict=True):
            recorded.copy_(tensor)
        return replay().clone()


class GraphRecorder:
    """Makes CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Replay) -> Replay:
        """Return the recording of `compute`, which has not run yet.

        Raises torch.OutOfMemoryError.
        """
        graph = torch.cuda.CUDAGraph()
        out_of_memory: str | None = None
        with torch.cuda.graph(graph, pool=self._pool):
            try:
                result = compute()
            except torch.OutOfMemoryError as error:  # which must not pass through the recording
                out_of_memory = str(error)
        if out_of_memory is not None:
            raise torch.OutOfMemoryError(out_of_memory)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
