"""Workers on nodes that do not share the results folder: their files go through the cluster.

    worker: trial's state ◀──fetch── FileServer, on the driver's node ◀─▶ results folder
            state, answers, model ──send, before each report──▶

A worker group finds out by itself whether it sees the results folder. If not, a trial reads and
writes in a scratch folder of its node, as it would in the results folder, and knows nothing of it.
"""

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayTaskError

from nanovlm import parallel
from nanovlm.cluster.file_server import (
    CHUNK_BYTES,
    FileAccess,
    FileChanged,
    OutdatedLease,
)
from nanovlm.files import Version
from nanovlm.messages import Job, ProgressUpdate, Report
from nanovlm.training.meter import OnUpdate

logger = logging.getLogger(__name__)

_PATHS = ("state_dir", "output_dir", "answers_file")
"""The fields of a job that lead into the results folder."""

_NUM_IN_FLIGHT = 3
"""Chunks of one transfer."""

_SCRATCH_PREFIX = "nanovlm-worker-"
_LOCK_FILE = ".lock"
_SECONDS_BETWEEN_SIGNS = 1.0
"""Of life, while files are sent."""

BeginTrial = Callable[[Job, OnUpdate], Generator[Report, None, None]]
"""Begins `nanovlm.trial.run_trial` with a job."""


class _Place(NamedTuple):
    """A folder or file of a trial."""

    here: Path
    name: str
    """Its path in the results folder, relative."""

    def versions(self) -> dict[str, Version]:
        """Return the files that are here, by their names in the results folder."""
        if self.here.is_file():
            return {self.name: Version.of(self.here)}
        files = self.here.iterdir() if self.here.is_dir() else ()
        return {f"{self.name}/{file.name}": Version.of(file) for file in files}


class NodeFiles:
    """The files of a worker group that does not see the results folder, on one of its nodes."""

    def __init__(self, access: FileAccess, scratch: Path, fetches: bool) -> None:
        """
        Args:
            scratch: a folder of this node, which all ranks on the node share.
            fetches: whether this rank fetches files for all of them.
        """
        self._access = access
        self._scratch = scratch
        self._fetches = fetches

    def append_log(self, name: str, lines: str) -> None:
        ray.get(self._access.server.append_log.remote(name, lines))

    def run(
        self, begin: BeginTrial, job: Job, lease: int, on_update: OnUpdate
    ) -> Generator[Report, None, None]:
        """Run a trial; before each report, its files are in the results folder.

        All ranks of the group call this together.
        """
        root = self._access.folder
        places = {
            key: _Place(self._scratch / name, str(name))
            for key in _PATHS
            if (path := getattr(job, key)) is not None and (name := Path(path).relative_to(root))
        }
        local = {key: str(place.here) for key, place in places.items()}
        signs = _SignsOfLife(on_update)
        transfer = _Transfer(self._access.server, job.trial_id, lease, [*places.values()], signs)
        try:
            if parallel.rank() == 0:
                transfer.take_over()
            parallel.gather_objects(None)  # none fetches before that
            if self._fetches and "state_dir" in places:
                transfer.fetch(places["state_dir"])
            parallel.gather_objects(None)  # none reads before that
            job = replace(job, **local)  # type: ignore[arg-type]
            with contextlib.closing(begin(job, signs.on_update)) as reports:
                for report in reports:
                    if parallel.rank() == 0:
                        transfer.send_changes()
                    yield report
        finally:
            if self._fetches:
                _empty(self._scratch)


def _get(reference: Any) -> Any:
    """Return what a call of the server returns; its error is the one that it raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error


class _Transfer:
    """Brings the files of a trial to its node and back, under one lease."""

    def __init__(
        self,
        server: Any,
        trial_id: str,
        lease: int,
        places: Sequence[_Place],
        signs: "_SignsOfLife",
    ) -> None:
        self._server = server
        self._trial_id = trial_id
        self._lease = lease
        self._places = places
        self._signs = signs
        self._known: dict[str, Version] = {}
        """The files here that are the same in the results folder."""

    def take_over(self) -> None:
        names = tuple(place.name for place in self._places)
        _get(self._server.take_over.remote(self._trial_id, self._lease, names))

    def fetch(self, folder: _Place) -> None:
        """Make the folder here what it is in the results folder."""
        while True:
            try:
                _empty(folder.here)
                for name, wanted in _get(self._server.versions.remote(folder.name)).items():
                    folder.here.mkdir(parents=True, exist_ok=True)
                    self._fetch_file(folder.here / Path(name).name, name, wanted)
                break
            except FileChanged:
                logger.info("%s was replaced while it was fetched", folder.name)
        self._known = folder.versions()

    def _fetch_file(self, path: Path, name: str, wanted: Version) -> None:
        chunks = deque[Any]()
        with path.open("wb") as file:
            for offset in range(0, wanted.size, CHUNK_BYTES):
                if len(chunks) == _NUM_IN_FLIGHT:
                    file.write(_get(chunks.popleft()))
                chunks.append(self._server.read.remote(name, wanted, offset))
            while chunks:
                file.write(_get(chunks.popleft()))

    def send_changes(self) -> None:
        """Send the files that are not in the results folder as they are here."""
        try:
            for place in self._places:
                for name, now in place.versions().items():
                    if self._known.get(name) != now:
                        path = place.here if name == place.name else place.here / Path(name).name
                        self._send_file(path, name)
                        self._known[name] = now
        except OutdatedLease:  # the broker will say so, too
            logger.warning("another group has %s: its files are not sent", self._trial_id)

    def _send_file(self, path: Path, name: str) -> None:
        send = functools.partial(self._server.write.remote, self._trial_id, self._lease, name)
        calls = deque[Any]()
        with path.open("rb") as file:
            for offset in range(0, max(1, os.fstat(file.fileno()).st_size), CHUNK_BYTES):
                if len(calls) == _NUM_IN_FLIGHT:
                    _get(calls.popleft())
                    self._signs.give()
                chunk = ray.put(np.fromfile(file, np.uint8, CHUNK_BYTES))
                calls.append(send(offset, [chunk]))
        for call in calls:
            _get(call)
        _get(self._server.finish.remote(self._trial_id, self._lease, name))


class _SignsOfLife:
    """Repeats the last progress update of a trial: it is at work, though it does not train."""

    def __init__(self, on_update: OnUpdate) -> None:
        self._send = on_update
        self._last: ProgressUpdate | None = None
        self._sent_at = 0.0

    def on_update(self, update: ProgressUpdate) -> None:
        self._last, self._sent_at = update, time.monotonic()
        self._send(update)

    def give(self) -> None:
        if self._last is not None and time.monotonic() - self._sent_at > _SECONDS_BETWEEN_SIGNS:
            self.on_update(self._last)


@contextlib.contextmanager
def node_files(access: FileAccess | None) -> Iterator[NodeFiles | None]:
    """Yield the files of this worker group; None if all of its ranks see the results folder.

    All ranks call this together. Those on one node share a scratch folder, which the first of them
    has made.
    """
    is_direct = access is None or access.is_direct()
    if access is None or all(parallel.gather_objects(is_direct)):
        yield None
        return
    node = ray.get_runtime_context().get_node_id()
    first = parallel.gather_objects(node).index(node)
    is_first = first == parallel.rank()
    with _scratch_folder() if is_first else contextlib.nullcontext(Path()) as made:
        scratch = Path(parallel.gather_objects(str(made))[first])
        yield NodeFiles(access, scratch, is_first)


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Make a folder for as long as the context lasts; remove those that killed workers left."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or just being removed
            if leftover.stat().st_uid == os.getuid():
                with _locked(leftover / _LOCK_FILE):
                    shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX))
    new = folder / f"{_LOCK_FILE}.new"
    new.touch()
    try:
        with _locked(new):
            new.rename(folder / _LOCK_FILE)  # others take a folder for a leftover from now on
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that exists; it ends with the process.

    Raises:
        BlockingIOError: a living process has it.
    """
    with path.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _empty(folder: Path) -> None:
    """Remove what is in a folder of this node, but for its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK_FILE:
            path.unlink()
