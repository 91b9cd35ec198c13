"""A results folder before and around a run: its name, its lock, its data, its disk, its machine."""

import contextlib
import fcntl
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from nanovlm.config.database_url import hide_words
from nanovlm.config.space import SearchSpace
from nanovlm.errors import RunFailed, UserError
from nanovlm.files import (
    check_text,
    find_full_disk,
    free_bytes,
    gib,
    remove_folder,
    remove_parts,
)
from nanovlm.results.read import DATA_FILE, FILES, FOLDERS, LOGS_DIR, SPACE_FILE, FolderReader

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PACKAGES = ("nanovlm", "torch", "ray", "optuna", "transformers")
"""Whose versions `environment.json` has."""

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the program of a job."""

_LONGEST_NAME = 255
"""Bytes that file systems take."""
_CODE = Path(__file__).parents[2]
_SECONDS = 10
"""For a program that is asked; one that hangs must not hold up a search."""


def choose_folder(results: Path, name: str | None, default_name: str) -> Path:
    """Return the results folder to make: `name`, or the default name with a number if it is taken.

    Raises:
        UserError: if the user named a folder that exists, or that cannot be.
    """
    check_kept(results)
    check_text("--name" if name else "--results", results / (name or default_name))
    if name is None:
        numbered = (f"{default_name}-{number}" for number in itertools.count(2))
        folders = (results / each for each in itertools.chain([default_name], numbered))
        return next(folder for folder in folders if not folder_exists(folder))
    folder = results / name
    check_name(name)
    if folder_exists(folder):
        raise UserError(f"--name: {folder} holds results already; choose another name or remove it")
    return folder


def search_folder(results: Path, name: str | None, space: SearchSpace, resume: bool) -> Path:
    """Return the results folder to make, or with `resume` the one to go on with.

    Args:
        results: where results folders are made.
        name: of the folder; None takes the space's name.

    Raises:
        UserError: the name is taken, or there is no such search to go on with.
    """
    if not resume:
        return choose_folder(results, name, space.name)
    check_kept(results)
    folder = results / (name or space.name)
    folder_exists(folder)
    check_same_space(folder, space)
    return folder


def check_same_space(folder: Path, space: SearchSpace) -> None:
    """Raise UserError if the folder holds no search of this space."""
    reader = FolderReader(folder)
    if not reader.has(SPACE_FILE):
        raise UserError(f"--resume: {folder} holds no search to go on with (no {SPACE_FILE})")
    theirs = reader.space(())
    reader.raise_if_damaged()
    assert theirs is not None, "it is there and not damaged"
    differing = space.differences(theirs)
    if differing:
        raise UserError(
            f"--resume: the search in {folder} is of another space; it differs in "
            f"{', '.join(differing)}; only the budget, bounds of objectives and "
            "resources.stall_minutes may change"
        )


def folder_exists(folder: Path) -> bool:
    """Return whether there is such a folder or file. Raises UserError if there cannot be."""
    size = len(os.fsencode(folder.name))
    if size > _LONGEST_NAME:
        raise UserError(f"--name: must not exceed {_LONGEST_NAME} bytes, got {size}: {folder}")
    try:
        return bool(folder.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"--name: {folder}: {error.strerror}") from None


def has_begun(folder: Path) -> bool:
    """Return whether there is a run in the folder to go on with.

    What a program left that was killed before it could begin is removed, so that it may be begun.
    """
    if not folder_exists(folder):
        return False
    if any((folder / name).exists() for name in FILES):
        return True
    with locked(folder):
        discard_folder(folder, ())
    return False


def check_kept(results: Path | str, is_job: bool | None = None) -> None:
    """Raise UserError if results at this path would be lost with the Ray job that makes them.

    Args:
        results: a path, or the URI of a folder in a bucket.
        is_job: whether it is made by a job; None says whether this program is one.
    """
    if is_job is None:
        is_job = IN_RAY_JOB in os.environ
    if is_job and isinstance(results, Path) and not results.is_absolute():
        raise UserError(
            f"--results: must be an absolute path in a Ray job, got {str(results)!r}: a "
            "job works in a temporary folder of Ray, and its results would be removed with that"
        )


def check_name(name: str) -> None:
    """Raise UserError unless `name` is the plain name of a folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name: must be the plain name of a folder, got {name!r}")


def make_folder(folder: Path, default_name: str | None) -> tuple[Path, list[Path]]:
    """Make the folder and its `logs/`; return it and the folders above it that were made for it.

    If another program makes it first, the next number of the default name is taken, if there is
    one. Raises UserError if it cannot be made.
    """
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        (folder / LOGS_DIR).mkdir()
    except FileExistsError:
        if default_name is None:
            raise UserError(f"--name: {folder} exists already; choose another name") from None
        return make_folder(choose_folder(folder.parent, None, default_name), default_name)
    except OSError as error:
        raise UserError(f"--results: {folder} cannot be made: {error.strerror}") from None
    return folder, parents


def discard_folder(folder: Path, parents: Sequence[Path]) -> None:
    """Remove what this program has made in the folder, then the folder and those above it that
    hold nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        remove_folder(folder / name)
    remove_parts(folder)
    for made in (folder, *parents):
        if any(made.iterdir()):
            return
        made.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other programs out of the folder. Raises UserError if one is there already."""
    path = folder / LOGS_DIR / LOCK_FILE
    try:
        path.parent.mkdir(exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another program works in this folder") from None
        yield


def check_same_data(folder: Path, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what could not be checked of the data with which the run in `folder` has begun.

    Raises UserError if it would go on with other data, or `data.json` is damaged.
    """
    reader, path = FolderReader(folder), folder / DATA_FILE
    before = reader.data()
    if reader.problems:
        remedy = "or remove it to go on unchecked"
        raise UserError(*(f"--resume: {problem}, {remedy}" for problem in reader.problems))
    if before is None:
        return (f"{path} was gone: whether the data is the same could not be checked",)
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    keys = {part: (before[part].get("folder", ""), data[part]["folder"]) for part in data}
    differing = [part for part, (old, new) in keys.items() if Path(old).name != Path(new).name]
    if differing:
        raise UserError(
            f"--resume: the data for {' and '.join(differing)} is not that of {path}: what was "
            "learnt from both could not be compared. Of a data set on the hub ID@COMMIT names a "
            "version; the files of a folder must be as they were, in content and time"
        )
    return ()


@contextlib.contextmanager
def explain_full_disk(folder: Path, most_bytes: int | None = None) -> Iterator[None]:
    """Raise RunFailed in place of an error of a full disk that ends the context.

    Args:
        folder: the results folder.
        most_bytes: that the run may take there at a time; None if that is not known.
    """
    try:
        yield
    except Exception as error:
        cause = find_full_disk(error)
        if cause is None:
            raise
        logger.exception("the disk is full")
        needed = ""
        if most_bytes is not None:
            held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            needed = f", and it may need {gib(max(0, most_bytes - held))} more"
        raise RunFailed(
            f"the disk is full: {cause}. The run is in {folder}, where {gib(free_bytes(folder))} "
            f"are free{needed}; what it has recorded is whole. Make room and go on with --resume"
        ) from error


def describe_environment() -> dict[str, Any]:
    """Return the content of `environment.json`: versions, machine, GPUs and commit of the code.

    Imports none of the packages it names.
    """
    installed = {package.name for package in metadata.distributions()}
    is_checkout = (_CODE / ".git").exists()  # installed packages may lie in a repository of others
    git = ("git", "-C", str(_CODE))
    commit = _output(*git, "rev-parse", "HEAD") if is_checkout else None
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "python": platform.python_version(),
        "packages": {
            name: metadata.version(name) if name in installed else None for name in PACKAGES
        },
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": (gpus or "").splitlines(),
        "git_commit": commit,
        "git_is_dirty": None if changes is None else bool(changes),
        "command": [Path(sys.argv[0]).name, *hide_words(sys.argv[1:])],
    }


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
