"""Prepared data on disk: one folder for each recipe, complete once its manifest is there.

    HF_HOME/assets/nanovlm/prepared/<key>/        (HF_ASSETS_CACHE moves it)
      about.json       what it was made from
      images.bin       uint8[R, 3, S, S]
      features.bin     in a folder of its own: a vision encoder's output for each image
      *.npy            tokens and where each sample's lie
      manifest.json    written last: counts, unreadable rows
      parts-*/         parts that an interrupted build has done

Everything is written under another name and then renamed, so a reader never meets half a file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from huggingface_hub import cached_assets_path

from nanovlm.errors import UserError
from nanovlm.files import remove_folder, remove_parts, replace_json, replacing

ABOUT_FILE = "about.json"
MANIFEST_FILE = "manifest.json"
IMAGES_FILE = "images.bin"
FEATURES_FILE = "features.bin"
KEY_LENGTH = 16


def prepared_root() -> Path:
    """Return the folder that holds all prepared data, made if it is not there."""
    try:
        return cached_assets_path("nanovlm", namespace="prepared", subfolder="").resolve()
    except (OSError, ValueError) as error:
        raise UserError(
            f"HF_ASSETS_CACHE (else HF_HOME/assets): no folder can be made there: {error}"
        ) from error


@dataclass(frozen=True)
class PreparedFolder:
    """The folder of one recipe's prepared data, there or not."""

    path: Path
    about: Mapping[str, Any]

    @staticmethod
    def of(recipe: Mapping[str, Any], **notes: str) -> "PreparedFolder":
        """Return the folder of what `recipe` says; any other value means another folder.

        Args:
            notes: further entries of `about`, on which the folder does not depend.
        """
        content = json.dumps(recipe, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]
        return PreparedFolder(prepared_root() / key, {**notes, **recipe})

    @property
    def is_complete(self) -> bool:
        return (self.path / MANIFEST_FILE).is_file()

    def manifest(self) -> dict[str, Any]:
        """Return what is known of the complete data."""
        with self._readable(MANIFEST_FILE) as path:
            return {**json.loads(path.read_text())}

    def array(self, name: str) -> np.ndarray:
        """Return the array `name`, memory-mapped, not to be written to."""
        with self._readable(f"{name}.npy") as path:
            array: np.ndarray = np.load(path, mmap_mode="r")
            return array

    def mapped(
        self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.uint8
    ) -> np.ndarray:
        """Return a file of numbers of `shape`, memory-mapped, not to be written to.

        A mapping that could be written to, even a private one, would count as memory that is
        promised, and the system would refuse it for files larger than what it has.

        Raises:
            UserError: the file has another size: someone has changed it.
        """
        with self._readable(name) as path:
            size = path.stat().st_size
            expected = math.prod(shape) * np.dtype(dtype).itemsize
            if size != expected:
                raise ValueError(f"must have {expected} bytes, has {size}")
            if not expected:  # nothing can be mapped
                return np.empty(shape, dtype)
            return np.memmap(path, dtype, mode="r", shape=shape)

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        """Give the path of a file. Raises UserError if it cannot be read in the context."""
        path = self.path / name
        try:
            yield path
        except (OSError, ValueError, TypeError, EOFError) as error:
            command = f"python -m nanovlm data delete {self.path.name}"
            raise UserError(
                f"{path}: is damaged or missing: {error}; after `{command}` it is prepared again"
            ) from None

    def write_array(self, name: str, array: np.ndarray) -> None:
        with replacing(self.path / f"{name}.npy") as part, part.open("wb") as file:
            np.save(file, array)

    def write_json(self, name: str, content: Any) -> None:
        replace_json(self.path / name, content)

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Let one process work here at a time; calls `on_wait` if another does.

        The lock falls when its holder ends, however it ends.
        """
        lock = filelock.FileLock(f"{self.path}.lock")
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            held = lock.acquire()
        with held:
            yield


def prepared_folders() -> list[PreparedFolder]:
    """Return all prepared data, complete or not, the oldest first."""
    found = sorted(prepared_root().glob(f"*/{ABOUT_FILE}"), key=lambda path: path.stat().st_mtime)
    return [PreparedFolder(path.parent, _about(path)) for path in found]


def _about(path: Path) -> dict[str, Any]:
    """Return what `about.json` says; of a damaged file that it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    known = content if isinstance(content, dict) else {}
    return {"what": "unknown", "path": f"unknown, {ABOUT_FILE} is damaged", **known}


def size_on_disk(folder: Path) -> int:
    """Return the bytes that the folder's files take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def delete(folder: PreparedFolder) -> None:
    """Remove prepared data. Programs that read it keep what they have mapped.

    Raises:
        UserError: a program is preparing it at the moment, or other files lie there; these stay.
    """
    lock = filelock.FileLock(f"{folder.path}.lock")
    try:
        with lock.acquire(timeout=0):
            _remove(folder.path)
    except filelock.Timeout:
        raise UserError(f"{folder.path}: another program is preparing this data") from None


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link, and what it leads to stays; remove it by hand")
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # first, so half is never whole
    files = [folder / name for name in (IMAGES_FILE, FEATURES_FILE, ABOUT_FILE)]
    for path in [*folder.glob("*.npy"), *files]:
        path.unlink(missing_ok=True)
    for parts in folder.glob("parts-*"):
        remove_folder(parts)
    remove_parts(folder)
    others = sorted(path.name for path in folder.iterdir())
    if others:
        raise UserError(
            f"{folder}: the prepared data is removed; what this program has not made stays: "
            f"{', '.join(others)}"
        )
    folder.rmdir()
