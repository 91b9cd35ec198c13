"""Whether anything can be compiled, asked in a process of its own; and how much is kept of it.

That a trial runs without a compiler is tested in tests/test_trial.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm.models import compiled

ASK = "from nanovlm.models.compiled import find_compile_obstacle as f; print(f('cpu'))"


@pytest.mark.slow
def test_a_compiler_that_compiles_nothing(tmp_path: Path) -> None:
    """As g++ without the headers of Python: its own words are the reason."""
    script = tmp_path / "g++"
    message = "fatal error: Python.h: No such file or directory"
    lines = ["#!/bin/sh", '[ "$1" = --version ] && exec echo 13', f'echo "{message}" >&2', "exit 1"]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": str(script)}
    answer = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout.strip() == message


def squared(x: torch.Tensor) -> torch.Tensor:
    return x * x


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_shapes_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a search over a range of batch sizes: past the limit all is forgotten, and goes on."""
    monkeypatch.setattr(compiled, "MAX_COMPILED", 2)
    inputs = [torch.full((size,), float(size), requires_grad=True) for size in (1, 2, 3, 1)]
    outputs = [compiled.call_compiled(squared, x).sum() for x in inputs]
    torch.stack(outputs).sum().backward()  # of what was forgotten, too
    assert [output.item() for output in outputs] == [1, 8, 27, 1]
    assert [x.grad.tolist() for x in inputs if x.grad is not None] == [[2], [4] * 2, [6] * 3, [2]]
