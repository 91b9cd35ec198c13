"""What tests share that run on a GPU as well as on the CPU, where the same code is rehearsed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

on_each_device = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="gpu", marks=pytest.mark.gpu)]
)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let every operation give the same bits each time, also in backward passes on a GPU."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def use_bfloat16(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Let forward passes compute in bfloat16, or in float32, whatever the device is."""
    monkeypatch.setattr("nanovlm.training.forward.has_bfloat16", lambda device: wanted)
