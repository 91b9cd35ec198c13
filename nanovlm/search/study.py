"""Where Optuna keeps a search: a file of the results folder, or a database of a cluster.

A study is bound to its space. What it holds of another space would teach the sampler wrong things,
so a study of another space under the same name is refused. `show_study` opens it for reading alone.
"""

import contextlib
import copy
import json
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import optuna
import sqlalchemy
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nanovlm.config.database_url import PLACEHOLDER, fill_in, without_password_of
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import NO_SQLITE, Study
from nanovlm.config.sources import config_values, flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.files import append, drop_cut_line, identifier, replace_text, sync
from nanovlm.results.read import SEARCH_ID_FILE, STUDY_FILE, TRIALS_FILE, read_text
from nanovlm.samplers.configurations import choices
from nanovlm.samplers.history import OTHERS, STORAGE_ERRORS
from nanovlm.samplers.optuna_compat import METRIC_NAMES, with_objectives

STUDY_NAME = "search"
SPACE = "space"
"""The study's attribute that holds what it is bound to."""

_SEARCH_ID = re.compile("[0-9a-f]{32}")
_CONNECT_SECONDS = 10
_CONNECT_TIMEOUT = {"postgresql": "connect_timeout", "mysql": "connect_timeout"}
_SECONDS_BETWEEN_SYNCS = 1.0
_SHOWN_DIFFERENCES = 5
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}


@dataclass(frozen=True)
class StudyLocation:
    """Where a search finds its study."""

    storage: BaseStorage
    name: str
    search_id: str
    """Tells the trials of this results folder from those of others in the same study."""
    file: "StudyFile | None" = None
    """None if it is in a database, which other searches may use too."""

    def load(self) -> optuna.Study:
        return optuna.load_study(study_name=self.name, storage=self.storage)

    def without_password(self, text: str) -> str:
        """Return what the storage said, in which it may have quoted the password."""
        url = str(self.storage.url) if isinstance(self.storage, RDBStorage) else ""
        return without_password_of(url, text)


class StudyFile(JournalFileBackend):
    """Optuna's journal for one writer: the results folder is locked, so the journal needs no lock,
    no lock is left behind when the program is killed, and what was written here need not be read
    again.

    Writing is left to the operating system, which keeps it if the program is killed. `sync` makes
    it survive a power loss; the journal of a trial in between can be made again from
    `trials.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._num_read: int | None = None  # logs that the storage knows; None before it reads them
        self._new = deque[str]()  # the lines after those
        self._synced_at = -math.inf  # by time.monotonic
        drop_cut_line(path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        append(self._path, "".join(f"{line}\n" for line in lines), is_synced=False)
        self._new += lines

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yield the logs from a number on; each is asked for once, in order."""
        if self._num_read is None:
            self._num_read = 0
            for log in super().read_logs(0):
                self._num_read += 1
                yield log
        assert self._num_read >= log_number_from, f"{self._path}: a log was passed over"
        while self._new:
            self._num_read += 1
            yield json.loads(self._new.popleft())

    def sync(self) -> None:
        """Make the journal safe on the disk, unless that was done less than a second ago."""
        now = time.monotonic()
        if now - self._synced_at >= _SECONDS_BETWEEN_SYNCS:
            sync(self._path)
            self._synced_at = now


def open_study(space: SearchSpace, folder: Path) -> StudyLocation:
    """Return where the study of a results folder is; makes it if it is not there.

    Raises:
        UserError: the storage cannot be reached, or holds a study of another space by that name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = None
    if space.study.storage is None:
        with _readable(folder / STUDY_FILE):
            file = StudyFile(folder / STUDY_FILE)
            storage: BaseStorage = JournalStorage(file)
    else:
        storage = open_database(space.study)
    name = _study_name(space, folder)
    _bind(storage, name, space)
    search_id = read_search_id(folder)
    if search_id is None:
        search_id = uuid.uuid4().hex
        replace_text(folder / SEARCH_ID_FILE, search_id)
    return StudyLocation(storage, name, search_id, file)


def read_search_id(folder: Path) -> str | None:
    """Return what `study.id` holds; None if it is gone, or damaged."""
    text = (read_text(folder / SEARCH_ID_FILE) or "").strip()
    return text if _SEARCH_ID.fullmatch(text) else None


def _study_name(space: SearchSpace, folder: Path) -> str:
    default = STUDY_NAME if space.study.storage is None else identifier(folder.name)
    return space.study.name or default


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
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


class StorageAway(UserError):
    """The database does not answer, or refuses."""


def open_database(study: Study) -> BaseStorage:
    """Return the database that a space file names.

    Raises:
        UserError: it cannot be used; StorageAway if that may pass.
    """
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
        raise StorageAway(f"study.storage: {shown} cannot be used: {reason}") from None


def _bind(storage: BaseStorage, name: str, space: SearchSpace) -> None:
    """Make the study, or raise UserError if there is one of another space by that name."""
    ours = _signature(space)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction=_DIRECTIONS[space.objective.mode],
        load_if_exists=True,
    )
    if SPACE not in study.user_attrs and not study.trials:
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
    return _flat_json(content)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    # What the version that made it did not know yet is as by default.
    there = {**_flat_json({"base": config_values(TrainConfig())}), **theirs}
    keys = dict.fromkeys((*ours, *theirs))
    return [
        f"{key}: {there.get(key)!r} there, {ours.get(key)!r} here"
        for key in keys
        if there.get(key) != ours.get(key)
    ]


def _flat_json(content: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(flat_values(content))))


class ReadOnly(Exception):
    """Something was to be written to a study that is only shown."""


class ReadOnlyStudy(BaseStorage):
    """The storage of one study, of which everything can be read and nothing written.

    It follows the search while it runs. The search writes its journal without a lock, so nobody
    else may write to it. Choices among numbers are shown as they are, where the study keeps indices
    (`configurations.py`). A study of several objectives, which keeps all but the first as
    attributes (`study_recorder.py`), has all of them here, so that the dashboard draws their front.
    """

    def __init__(self, storage: BaseStorage, name: str, space: SearchSpace) -> None:
        self._storage, self._name = storage, name
        self._directions = {each.metric: _DIRECTIONS[each.mode] for each in space.objective.all}
        self._choices = {
            p.key: CategoricalDistribution(choices(p)) for p in space.parameters if p.is_ordered
        }

    def _raise(self, *arguments: Any, **named: Any) -> NoReturn:
        raise ReadOnly("this study is shown while its search may run; nothing can be written to it")

    _refuse: Any = _raise
    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = _refuse
    set_trial_intermediate_value = set_trial_user_attr = set_trial_system_attr = _refuse

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return list(self._directions.values())

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attributes = self._storage.get_study_system_attrs(study_id)
        return {**attributes, METRIC_NAMES: list(self._directions)}

    def get_all_studies(self) -> list[Any]:
        """Return this study alone; a database may hold others, of other spaces."""
        studies = [s for s in self._storage.get_all_studies() if s.study_name == self._name]
        return [with_objectives(study, self._directions) for study in studies]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._with_values(self._storage.get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(study_id, deepcopy, states)
        return [self._with_values(trial) for trial in trials]

    def _with_values(self, trial: FrozenTrial) -> FrozenTrial:
        """Return the trial with choices instead of their indices and values of all objectives.

        Of several objectives Optuna has no values on the way, and none of a trial that has ended
        before its end."""
        shown = copy.copy(trial)
        shown.params = {
            key: self._choices[key].choices[value] if key in self._choices else value
            for key, value in trial.params.items()
        }
        shown.distributions = {
            key: self._choices.get(key, known) for key, known in trial.distributions.items()
        }
        if len(self._directions) > 1:
            steps, others = trial.intermediate_values, trial.user_attrs.get(OTHERS, {})
            whole = [step for step in steps if str(step) in others]
            shown.intermediate_values, shown.values = {}, None
            if trial.state is TrialState.COMPLETE and whole:
                shown.values = [steps[max(whole)], *others[str(max(whole))]]
        return shown


def show_study(space: SearchSpace, folder: Path) -> ReadOnlyStudy:
    """Return the study of a results folder, which is not touched. It follows a search that runs.

    Raises:
        UserError: there is no study yet, or the database cannot be reached.
    """
    name = _study_name(space, folder)
    if space.study.storage is not None:
        where = space.study.shown_storage
        storage = get_storage(open_database(space.study))
    else:
        path = folder / STUDY_FILE
        where = str(path)
        if not path.is_file():
            raise UserError(f"{folder}: the search has made no study yet (no {STUDY_FILE})")
        with _readable(path):  # only ever read: takes no lock
            storage = JournalStorage(JournalFileBackend(str(path)))
    shown = ReadOnlyStudy(storage, name, space)
    if not shown.get_all_studies():
        raise UserError(f"{where} holds no study {name!r}")
    return shown
