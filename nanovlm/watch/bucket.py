"""Runs whose results go to a bucket: they write to a local folder, and a thread copies that there.

    with results_in(place, name, is_resumed) as (folder, observers):
        ...  # results folders are made in `folder`

The rest of the program knows the local folder alone, and `nanovlm.files.shown` how to name it.
"""

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanovlm import process
from nanovlm.errors import RunFailed, UserError
from nanovlm.files import name_as
from nanovlm.results.mirror import Mirror
from nanovlm.results.remote import FAILURES, RemoteFolder, open_remote, reason_of
from nanovlm.watch.observer import Observer

logger = logging.getLogger(__name__)

_COPY_PREFIX = "nanovlm-results-"

_PAUSE_SECONDS = 2.0
_LEAST_PAUSE = 4.0
"""The shortest pause, in times of what the pass before has taken."""
_NUM_LAST_TRIES = 3


@contextlib.contextmanager
def results_in(
    place: Path | str, name: str, is_resumed: bool
) -> Iterator[tuple[Path, Sequence[Observer]]]:
    """Yield the local folder in which results folders are made, and observers for the run.

    Args:
        place: where results folders are made: a path, or the URI of a folder in a bucket.
        name: of the results folder to go on with.
        is_resumed: whether that is wanted, if it is there.

    Raises:
        UserError: the bucket cannot be used.
        RunFailed: it could not be written at last, and the results are in the local folder.
    """
    if isinstance(place, Path):
        yield place, ()
        return
    remote = open_remote("--results", place, will_write=True)
    root = Path(tempfile.mkdtemp(prefix=_COPY_PREFIX)).resolve()
    name_as(root, remote.address)
    copier = None
    try:
        copier = _begin(remote, root, name if is_resumed else None)
        with _named_as(root, remote.uri), process.on_abandon(copier.finish_at_once):
            yield root, (copier,)
    except BaseException as error:
        _finish(copier, root, remote, error)
        raise
    _finish(copier, root, remote, None)


def _begin(remote: RemoteFolder, root: Path, resumed: str | None) -> "Copier":
    """Fetch the folder to go on with, and take all other names; start the thread."""
    try:
        taken = remote.names()
        copier = Copier(remote, root, taken - {resumed})
        if resumed in taken:
            copier.fetch(resumed)
        for name in taken - {resumed}:  # so that names are chosen as in a local folder
            (root / name).mkdir()
    except FAILURES as error:
        raise UserError(f"--results: {remote.uri} cannot be read: {reason_of(error)}") from error
    copier.start()
    return copier


@contextlib.contextmanager
def _named_as(root: Path, uri: str) -> Iterator[None]:
    """Let errors name the bucket in place of the local copy."""
    try:
        yield
    except UserError as error:
        raise UserError(*(text.replace(str(root), uri) for text in error.messages)) from error
    except RunFailed as error:
        renamed = RunFailed(str(error).replace(str(root), uri))
        renamed.folder = error.folder
        raise renamed from error


def _finish(
    copier: "Copier | None", root: Path, remote: RemoteFolder, error: BaseException | None
) -> None:
    """Copy what is left, and remove the local folder; if that fails, raise with what to do."""
    with process.in_order():  # a signal that comes now lets it come to its end
        reason = None if copier is None else copier.finish()
    if reason is None or copier is None:
        shutil.rmtree(root, ignore_errors=True)
        return
    before = f"{error}\n" if isinstance(error, UserError | RunFailed) else ""
    raise RunFailed(
        f"{before}{remote.uri}: the last results could not be copied there: {reason}. They are in "
        f"{copier.folder}: copy them, or go on with --results {root} and --resume"
    ) from error


class Copier(Observer):
    """Copies the results folder to the bucket while the run lasts.

    A bucket that fails for a while is a notice: what has changed is copied later.
    """

    def __init__(self, remote: RemoteFolder, root: Path, taken: set[str]) -> None:
        """
        Args:
            root: the folder in which the results folder will be made.
            taken: names in it that are not that of the results folder.
        """
        self._remote = remote
        self._root = root
        self._taken = taken
        self._mirror: Mirror | None = None
        self.folder = root
        """The results folder, once it is there."""
        self._problem: str | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bucket", daemon=True)

    @property
    def problem(self) -> str | None:
        return self._problem

    @property
    def notes(self) -> Sequence[str]:
        return ()  # the end of the program says whether the results are there

    def fetch(self, name: str) -> None:
        self._mirror_of(self._root / name).fetch()

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> str | None:
        """Copy what is left; return why that is not possible, None if it is."""
        self._is_over.set()
        self._thread.join()
        for number in range(_NUM_LAST_TRIES):
            if number:
                time.sleep(_PAUSE_SECONDS)
            if (reason := self._update()) is None:
                return None
        return reason

    def finish_at_once(self, error: Exception) -> None:
        """Copy what is left, for a program that has to end at once."""
        self.finish()

    def _work(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._is_over.wait(pause):
            began_at = time.monotonic()
            reason = self._update()
            if reason is not None:
                self._problem = f"{self._remote.uri}: copying fails and is tried again: {reason}"
                logger.warning("%s", self._problem)
            pause = max(_PAUSE_SECONDS, _LEAST_PAUSE * (time.monotonic() - began_at))

    def _update(self) -> str | None:
        """Copy what has changed; return why that has failed."""
        mirror = self._mirror
        if mirror is None:
            made = [p for p in self._root.iterdir() if p.name not in self._taken]
            made = [path for path in made if not path.name.startswith(".")]
            if not made:
                return None
            mirror = self._mirror_of(made[0])
        try:
            mirror.update()
        except FAILURES as error:
            return reason_of(error)
        return None

    def _mirror_of(self, folder: Path) -> Mirror:
        self.folder = folder
        self._mirror = Mirror(folder, self._remote.child(folder.name))
        return self._mirror
