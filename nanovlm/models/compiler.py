"""Whether torch.compile works here: it needs a C++ compiler on CPU, Triton on a GPU."""

from functools import cache

import torch


@cache
def find_compile_obstacle(device_type: str) -> str | None:
    """Return in a line why nothing can be compiled for this sort of device, None if it can.

    Found out by compiling x + 1, once in a process. That takes seconds, of which most are the start
    of torch's compiler, which the first model would have to wait for.
    """
    # Imported late: they take a second that a program without compilation need not wait.
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    x = torch.zeros(8, device=device_type)
    try:
        torch.compile(_add_one)(x)
    except (TritonMissing, GPUTooOldForTriton) as error:
        return _cause(error)
    except BackendCompilerFailed as error:  # whatever it is: a model would meet it too
        return _cause(error.inner_exception)
    return None


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _cause(error: Exception) -> str:
    """Return what is wrong in one line: in the compiler's own words, if it was one that failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    in_short = f"{type(error).__name__}: {next(filter(None, lines), '')}"
    return next((line for line in lines if "error:" in line), in_short)
