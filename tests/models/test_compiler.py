"""Whether anything can be compiled, asked in a process of its own.

That a trial runs without a compiler is tested in tests/test_trial.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = "from nanovlm.models.compiler import find_compile_obstacle as f; print(f('cpu'))"


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
