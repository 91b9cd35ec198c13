"""Where Optuna keeps a search: a file of the results folder, or a database of a cluster.

A study is bound to its space. What it holds of another space would teach the sampler wrong things,
so a study of another space under the same name is refused.
"""

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.database_url import PLACEHOLDER, fill_in, without_password_of
from nanovlm.config.search_settings import NO_SQLITE, Study
from nanovlm.config.sources import config_values, flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.files import append, drop_cut_line, find_full_disk, identifier, replace_text
from nanovlm.results.read import SEARCH_ID_FILE, STUDY_FILE, TRIALS_FILE, read_text
from nanovlm.samplers.history import STORAGE_ERRORS

STUDY_NAME = "search"
SPACE = "space"
"""The study's attribute that holds what it is bound to."""

_SEARCH_ID = re.compile("[0-9a-f]{32}")
_CONNECT_SECONDS = 10
_CONNECT_TIMEOUT = {"postgresql": "connect_timeout", "mysql": "connect_timeout"}
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class StudyPlace:
    """Where a search finds its study."""

    storage: BaseStorage
    name: str
    search_id: str
    """Tells the trials of this results folder from those of others in the same study."""

    def without_password(self, text: str) -> str:
        """Return what the storage said, in which it may have quoted the password."""
        url = str(self.storage.url) if isinstance(self.storage, RDBStorage) else ""
        return without_password_of(url, text)


class StudyFile(JournalFileBackend):
    """Optuna's journal for one writer: the results folder is locked, so the journal needs no lock,
    and no lock is left behind when the program is killed.

    Writing is left to the operating system, which keeps it if the program is killed. `sync` makes
    it survive a power loss; the journal of a trial in between can be made again from
    `trials.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        drop_cut_line(path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        append(self._path, lines, is_synced=False)

    def sync(self) -> None:
        with self._path.open("ab") as file:
            os.fsync(file.fileno())


class StudyFileStorage(JournalStorage):
    """The study file as a storage."""

    def __init__(self, path: Path) -> None:
        with readable(path):
            self.file = StudyFile(path)
            super().__init__(self.file)


def open_study(space: SearchSpace, folder: Path) -> StudyPlace:
    """Return where the study of a results folder is; makes it if it is not there.

    Raises:
        UserError: the storage cannot be reached, or holds a study of another space by that name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if space.study.storage is None:
        storage: BaseStorage = StudyFileStorage(folder / STUDY_FILE)
    else:
        storage = open_database(space.study)
    name = study_name(space, folder)
    _bind(storage, name, space)
    return StudyPlace(storage, name, _search_id(folder))


def study_name(space: SearchSpace, folder: Path) -> str:
    """Return the name of a results folder's study where it is kept."""
    default = STUDY_NAME if space.study.storage is None else identifier(folder.name)
    return space.study.name or default


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UserError if what is done in the context shows that a journal is damaged."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path}: is damaged: {type(error).__name__}: {error}; put back a copy of it, or "
            f"remove it: --resume makes it anew from {TRIALS_FILE}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def open_database(study: Study) -> BaseStorage:
    """Return the database that a space file names. Raises UserError if it cannot be used."""
    assert study.storage is not None, "a file was asked for"
    shown, filled = study.shown_storage, fill_in(study.storage)
    if filled.startswith("sqlite"):
        raise UserError(f"study.storage: {NO_SQLITE}")
    try:
        url = sqlalchemy.make_url(filled)
    except sqlalchemy.exc.ArgumentError:
        raise UserError(
            f"study.storage: must be the URL of a database, such as "
            f"postgresql+psycopg://USER:{PLACEHOLDER}@HOST/NAME, got {shown!r}"
        ) from None
    timeout = _CONNECT_TIMEOUT.get(url.get_backend_name())
    connect = {timeout: _CONNECT_SECONDS} if timeout else {}
    try:
        return RDBStorage(filled, engine_kwargs={"connect_args": connect, "pool_pre_ping": True})
    except ImportError as error:
        raise UserError(
            f"study.storage: {shown} needs a driver that is not installed ({error.name}); for "
            "PostgreSQL: pip install -e '.[postgres]'"
        ) from None
    except (*STORAGE_ERRORS, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        reason = without_password_of(filled, reason)
        raise UserError(f"study.storage: {shown} cannot be used: {reason}") from None


def _bind(storage: BaseStorage, name: str, space: SearchSpace) -> None:
    """Make the study, or raise UserError if there is one of another space by that name."""
    maximize = space.objective.mode == "max"
    ours = _signature(space)
    known = {summary.study_name for summary in optuna.get_all_study_summaries(storage, False)}
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )
    if name not in known or (SPACE not in study.user_attrs and not study.trials):
        study.set_user_attr(SPACE, ours)
        return
    theirs = study.user_attrs.get(SPACE)
    where = space.study.shown_storage or STUDY_FILE
    if theirs is None:
        raise UserError(
            f"study.name: {name!r} in {where} was not made by this program; choose another name"
        )
    differing = _differences(theirs, ours)
    if differing:
        more = len(differing) - _SHOWN_DIFFERENCES
        shown = differing[:_SHOWN_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"study.name: {name!r} in {where} is the study of another space; choose another name. "
            f"It differs in {'; '.join(shown)}"
        )


def _signature(space: SearchSpace) -> dict[str, Any]:
    """Return all that a value of the objective depends on, flat and as JSON gives it back."""
    content = {
        "base": config_values(space.base),
        "search": {parameter.key: parameter.to_yaml() for parameter in space.parameters},
        "objective": space.objective.without_bounds(),
    }
    return dict(json.loads(json.dumps(flat_values(content))))


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys((*ours, *theirs))
    return [
        f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]


def _search_id(folder: Path) -> str:
    search_id = read_search_id(folder)
    if search_id is None:
        search_id = uuid.uuid4().hex
        replace_text(folder / SEARCH_ID_FILE, search_id)
    return search_id


def read_search_id(folder: Path) -> str | None:
    """Return what `study.id` holds; None if it is gone, or damaged."""
    text = (read_text(folder / SEARCH_ID_FILE) or "").strip()
    return text if _SEARCH_ID.fullmatch(text) else None


logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""So long the storage may be away before the search ends."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def patiently(
    do: Callable[[], T], place: StudyPlace, switch: StopSwitch, tell: Callable[[str], None]
) -> T | None:
    """Return what `do` returns; try again while the storage is away, None if the search ends.

    A full disk under the results folder ends it at once: all else is written there, too.

    Args:
        switch: ends the waiting; it is thrown when the patience is over.
        tell: told in a sentence that the storage fails.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = _FIRST_PAUSE
    while True:
        try:
            return do()
        except STORAGE_ERRORS as error:
            if find_full_disk(error) and isinstance(place.storage, StudyFileStorage):
                switch.fail(error)
                return None
            reason = place.without_password(str(error))
        text = f"the study's storage fails, trying again: {reason}"
        logger.warning("%s", text)
        if pause == _FIRST_PAUSE:
            tell(text)
        if time.monotonic() > deadline:
            switch.stop(f"study.storage: cannot be written: {reason}")
        switch.pause(pause)
        if switch.is_thrown():
            return None
        pause = min(_LONGEST_PAUSE, 2 * pause)
