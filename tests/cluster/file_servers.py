"""File servers to which things happen, for the tests of transfers; Ray's workers import them."""

from pathlib import Path

import numpy as np

from nanovlm.cluster.file_server import CHUNK_BYTES, FileServer
from nanovlm.files import Version
from tests.full_disk import limit_files

LARGE = 5 * CHUNK_BYTES + 17
"""Bytes of a file of more chunks than are on their way at the same time."""


def random_bytes(seed: int, size: int = LARGE) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write(path: Path | str | None, content: bytes) -> None:
    """Replace a file as a whole, in a folder that is made if it is not there."""
    assert path is not None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.new")
    part.write_bytes(content)
    part.replace(path)


class FullServer(FileServer):
    """Has room for one chunk of a file."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        limit_files(CHUNK_BYTES)


class BusyServer(FileServer):
    """A large file is replaced by another one when its first chunk has been read."""

    def read(self, name: str, wanted: Version, offset: int) -> np.ndarray:
        chunk = super().read(name, wanted, offset)
        if offset == 0 and wanted.size == LARGE:
            write(self._folder / name, random_bytes(2, CHUNK_BYTES + 1))
        return chunk
