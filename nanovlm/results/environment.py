"""What a search runs on: versions, host, GPUs and the commit of the code; `environment.json`.

replace_json(folder / ENVIRONMENT_FILE, describe_environment())
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from nanovlm.config.database_url import hide_words

PACKAGES = ("nanovlm", "torch", "ray", "optuna", "transformers")

_CODE = Path(__file__).parents[2]
_SECONDS = 10
"""For a program that is asked; one that hangs must not hold up a search."""


def describe_environment() -> dict[str, Any]:
    """Return the content of `environment.json`. Imports none of the packages it names."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _gpu_names(),
        **_commit(_CODE),
        "command": [Path(sys.argv[0]).name, *hide_words(sys.argv[1:])],
    }


def _version(package: str) -> str | None:
    """Return the installed version, None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    """Return the GPUs of this machine, by NVIDIA's own program; none where that is not there."""
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _commit(folder: Path) -> dict[str, Any]:
    """Return the commit of the checkout that `folder` is, and whether files differ from it."""
    inside = (folder / ".git").exists()  # installed packages may lie in a repository of others
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD") if inside else None
    if commit is None:
        return {"git_commit": None, "git_is_dirty": None}
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_is_dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    return _run(command)


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
