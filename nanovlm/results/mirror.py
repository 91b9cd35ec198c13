"""Keeps the copy of a results folder in a bucket as new as it can, and always fit to go on from.

A search can be killed at any moment, since it writes each file before what depends on it. So that
this is true of the copy too, one pass takes all files at one moment, when nothing is written, or
else in reverse order: what depends on others first, so that what it depends on is not older. Then
it writes them in order, and removes at last what is gone.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanovlm.files import Version
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    BEST_MODEL_DIR,
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    CONFIRM_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    LOGS_DIR,
    PAUSED_FILE,
    REPORT_FILE,
    RUNGS_FILE,
    SEARCH_ID_FILE,
    SPACE_FILE,
    STUDY_FILE,
    SUMMARY_FILE,
    TENSORBOARD_DIR,
    TRIALS_FILE,
    WANDB_DIR,
)
from nanovlm.results.remote import RemoteFolder

ORDER = (
    *(DATA_FILE, ENVIRONMENT_FILE, SEARCH_ID_FILE, SPACE_FILE, CONFIG_FILE),
    *(STUDY_FILE, RUNGS_FILE, CHECKPOINTS_DIR, ANSWERS_DIR),
    *(TRIALS_FILE, CONFIRM_FILE, PAUSED_FILE),  # a paused trial that has ended needs no state
    *(SUMMARY_FILE, BEST_MODEL_DIR, BEST_CONFIG_FILE),
    *(REPORT_FILE, TENSORBOARD_DIR, WANDB_DIR, LOGS_DIR),
)
"""Files and folders of a results folder, each after those that it depends on."""

_LINES = (STUDY_FILE, RUNGS_FILE, PAUSED_FILE, TRIALS_FILE, CONFIRM_FILE)
"""Files that grow by lines, on which others depend."""
_MOST_TRIES = 20
_LEFT_OUT = f"{LOGS_DIR}/ray/"
"""What Ray writes for itself."""


class _Taken(NamedTuple):
    """A file at the moment of a pass."""

    name: str
    version: Version
    source: bytes | Path


class Mirror:
    """Copies a local results folder to a bucket, what has changed at each call of `update`."""

    def __init__(self, folder: Path, remote: RemoteFolder) -> None:
        """
        Args:
            folder: need not exist. Nobody else writes to the copy.
        """
        self._folder = folder
        self._remote = remote
        self._copied: dict[str, Version | None] = {}
        """Files of the copy, by name; None: of another content than here, or unknown."""

    def fetch(self) -> None:
        """Make the folder what its copy is; what nobody here has written is left out."""
        names = [name for name in self._remote.files() if name.split("/")[0] in ORDER]
        self._remote.download(self._folder, names)
        self._copied = {name: Version.of(self._folder / name) for name in names}

    def update(self) -> None:
        """Bring the copy up to date; it can be gone on from at every moment.

        Raises:
            One of FAILURES: it could not; the next call goes on.
        """
        if not self._folder.exists():
            if self._copied:
                self._remote.clear()
                self._copied.clear()
            return
        staging = self._folder.with_name(f".{self._folder.name}.staging")
        try:
            names, taken = self._take_at_rest(staging)
            for file in taken:
                self._copied[file.name] = None  # it may be there though the call has failed
                self._remote.put(file.name, file.source)
                self._copied[file.name] = file.version
            for name in [name for name in self._copied if name not in names]:
                self._remote.remove(name)
                del self._copied[name]
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _take_at_rest(self, staging: Path) -> tuple[set[str], list[_Taken]]:
        """Do what `_take` does, again if anything was written to the folder meanwhile that others
        depend on; a folder that never rests is taken as it is."""
        for _ in range(_MOST_TRIES):
            before = self._line_versions()
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            found = self._take(staging)
            if self._line_versions() == before:
                break
        return found

    def _line_versions(self) -> dict[str, Version]:
        paths = [path for name in _LINES if (path := self._folder / name).exists()]
        return {path.name: Version.of(path) for path in paths}

    def _take(self, staging: Path) -> tuple[set[str], list[_Taken]]:
        """Return the names of all files, and those that have changed in the order of writing."""
        names, taken = set[str](), list[_Taken]()
        for part in reversed(ORDER):
            for path in _files(self._folder / part):
                name = path.relative_to(self._folder).as_posix()
                try:
                    version = Version.of(path)
                    if version != self._copied.get(name):
                        source = _keep(path, staging / str(len(taken)), part in _LINES)
                        taken.append(_Taken(name, version, source))
                except FileNotFoundError:
                    continue  # it has been removed since it was listed
                names.add(name)
        return names, taken[::-1]


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the files below a folder, the last names first; none that is unfinished."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*"), reverse=True):
        name = file.relative_to(path.parent).as_posix()
        is_hidden = any(part.startswith(".") for part in Path(name).parts)
        if not is_hidden and not name.startswith(_LEFT_OUT) and file.is_file():
            yield file


def _keep(path: Path, link: Path, has_lines: bool) -> bytes | Path:
    """Return the content that a file has now: its whole lines, or another name of it, since files
    that are no lines are replaced as a whole."""
    if has_lines:
        content = path.read_bytes()
        return content[: content.rfind(b"\n") + 1]
    os.link(path, link)
    return link
