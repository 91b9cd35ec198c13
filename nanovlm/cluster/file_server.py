"""The results folder for workers on nodes that do not share it: an actor on the driver's node.

    with served_files(folder, is_own_cluster=False) as access:
        ...  # workers with `access` find out whether they see the folder, see transfer.py

Files come and go in chunks, through Ray's object store. A file that is received is not to be seen
before it is whole and safe on the disk.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanovlm.files import PART_SUFFIX, Version, append, sync
from nanovlm.results.read import LOGS_DIR

CHUNK_BYTES = 4 * 2**20
_NUM_THREADS = 8
"""Of the server: as many chunks are received at the same time, from whatever number of workers."""


class OutdatedLease(Exception):
    """Another worker group has the trial now."""


class FileChanged(Exception):
    """A file was replaced while it was read."""


class FileServer:
    """The results folder for workers that do not see it; a threaded actor.

    File names are relative to the folder. All files of a trial are sent under its lease: once a
    later group has asked for the trial's state, nothing of the earlier ones gets in.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._leases: dict[str, int] = {}  # trial id -> the latest
        self._lock = threading.Lock()

    def take_over(self, trial_id: str, lease: int, names: tuple[str, ...]) -> None:
        """Let nobody with an earlier lease change the trial's files any more.

        Args:
            names: the trial's files and folders, in which half files of earlier groups may be left.
        """
        with self._lock:
            self._leases[trial_id] = lease
            for path in (self._folder / name for name in names):
                for part in [
                    *path.parent.glob(f".{path.name}.[0-9]*{PART_SUFFIX}"),
                    *path.glob(f".*.[0-9]*{PART_SUFFIX}"),
                ]:
                    part.unlink(missing_ok=True)

    def versions(self, folder: str) -> dict[str, Version]:
        """Return the finished files in a folder by name; none if there is no such folder."""
        path = self._folder / folder
        if not path.is_dir():
            return {}
        files = [file for file in path.iterdir() if not file.name.endswith(PART_SUFFIX)]
        return {file.relative_to(self._folder).as_posix(): Version.of(file) for file in files}

    def read(self, name: str, wanted: Version, offset: int) -> np.ndarray:
        """Return a chunk of a file, as uint8[bytes].

        Raises:
            FileChanged: it has another content by now.
        """
        try:
            with (self._folder / name).open("rb") as file:
                if Version.of(file.fileno()) == wanted:
                    file.seek(offset)
                    return np.fromfile(file, np.uint8, CHUNK_BYTES)
        except FileNotFoundError:
            pass
        raise FileChanged(name)

    def write(self, trial_id: str, lease: int, name: str, offset: int, chunk: list[Any]) -> None:
        """Take in a chunk of a file, which is not to be seen before `finish`.

        Args:
            chunk: a reference to it, in a list: Ray would get the chunks of all waiting calls.

        Raises:
            OutdatedLease: see `take_over`.
            OSError: the disk is full; what was written of the file is gone.
        """
        part = self._part(name, lease)
        with self._lock:
            self._check(trial_id, lease)
            part.parent.mkdir(parents=True, exist_ok=True)
        rest = memoryview(ray.get(chunk[0]))
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                while rest:
                    num_written = os.pwrite(descriptor, rest, offset)
                    rest, offset = rest[num_written:], offset + num_written
            finally:
                os.close(descriptor)
        except OSError as error:
            part.unlink(missing_ok=True)
            error.filename = str(self._folder / name)
            raise

    def finish(self, trial_id: str, lease: int, name: str) -> None:
        """Replace the file by what was sent; it is safe on the disk then."""
        part, path = self._part(name, lease), self._folder / name
        sync(part)
        with self._lock:
            self._check(trial_id, lease)
            part.replace(path)
        sync(path.parent)

    def append_log(self, name: str, text: str) -> None:
        """Append lines to a log; they are left out if the disk has no room for them."""
        with contextlib.suppress(OSError):
            append(self._folder / LOGS_DIR / name, text, is_synced=False)

    def _part(self, name: str, lease: int) -> Path:
        path = self._folder / name
        return path.with_name(f".{path.name}.{lease}{PART_SUFFIX}")

    def _check(self, trial_id: str, lease: int) -> None:
        if self._leases.get(trial_id, lease) > lease:
            raise OutdatedLease(trial_id)


@dataclass(frozen=True)
class FileAccess:
    """How workers get to the files of the results folder."""

    folder: str
    """Its path, absolute."""
    marker: str
    """The path of a file with a name that nobody else has: who finds it sees the folder."""
    server: Any  # handle of the FileServer actor

    def is_direct(self) -> bool:
        """Return whether this process sees the folder and may write there."""
        return os.path.exists(self.marker) and os.access(self.folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def served_files(folder: Path, is_own_cluster: bool) -> Iterator[FileAccess | None]:
    """Serve a results folder meanwhile, which exists; on a cluster of our own there is one machine
    only, and no need for it."""
    if is_own_cluster:
        yield None
        return
    marker = folder / LOGS_DIR / f".shared-{secrets.token_hex(16)}"
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": _NUM_THREADS, "scheduling_strategy": here}
    server: Any = ray.remote(FileServer).options(**options).remote(str(folder))
    try:
        yield FileAccess(str(folder), str(marker), server)
    finally:
        ray.kill(server)
        marker.unlink(missing_ok=True)
