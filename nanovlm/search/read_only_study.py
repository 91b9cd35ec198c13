"""A study as others may look at it while the search runs: live, read-only, with the true values.

The search's own journal is written without a lock by one program, so nobody else may write to it.
Choices among numbers are kept as their places (`samplers.distribution`); here they are choices.
With several objectives, of which the study keeps the others as attributes (`told_study.py`), it is
shown as a study of all of them, so that the dashboard draws their front.
"""

import copy
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.results.read import STUDY_FILE
from nanovlm.samplers.scalarized import OTHERS
from nanovlm.search.study import open_database, readable, study_name

_METRIC_NAMES = "study:metric_names"
"""Optuna's attribute with the names of a study's objectives."""


class ReadOnly(Exception):
    """Something was to be written to a study that is only shown."""


class ReadOnlyStudy(BaseStorage):
    """The storage of one study, of which everything can be read and nothing written."""

    def __init__(self, storage: BaseStorage, name: str, space: SearchSpace) -> None:
        self._storage, self._name = storage, name
        self._objectives = space.objective.all
        self._choices = {
            p.key: CategoricalDistribution(sorted(p.values))  # type: ignore[type-var]
            for p in space.parameters
            if p.is_ordered
        }

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise ReadOnly("this study is shown while its search may run; nothing can be written to it")

    create_new_study: Any = _refuse
    delete_study: Any = _refuse
    set_study_user_attr: Any = _refuse
    set_study_system_attr: Any = _refuse
    create_new_trial: Any = _refuse
    set_trial_param: Any = _refuse
    set_trial_state_values: Any = _refuse
    set_trial_intermediate_value: Any = _refuse
    set_trial_user_attr: Any = _refuse
    set_trial_system_attr: Any = _refuse

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._directions(self._storage.get_study_directions(study_id))

    def _directions(self, stored: list[StudyDirection]) -> list[StudyDirection]:
        """Return those of all objectives; the study itself is of the first."""
        words = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
        return [*stored[:1], *(words[each.mode] for each in self._objectives[1:])]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attributes = self._storage.get_study_system_attrs(study_id)
        return {**attributes, _METRIC_NAMES: self._metrics}

    @property
    def _metrics(self) -> list[str]:
        return [each.metric for each in self._objectives]

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return this study alone; a database may hold others, of other spaces."""
        studies = [s for s in self._storage.get_all_studies() if s.study_name == self._name]
        for study in studies:
            study.system_attrs = {**study.system_attrs, _METRIC_NAMES: self._metrics}
            study._directions = self._directions(study._directions)
        return studies

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._with_values(self._storage.get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(study_id, deepcopy, states)
        return [self._with_values(trial) for trial in trials]

    def _with_values(self, trial: FrozenTrial) -> FrozenTrial:
        """Return the trial with choices in place of their places."""
        places = {key: trial.params[key] for key in self._choices if key in trial.params}
        chosen = {key: self._choices[key].choices[place] for key, place in places.items()}
        shown = copy.copy(trial)
        shown.params = {**trial.params, **chosen}
        shown.distributions = {
            key: self._choices.get(key, distribution)
            for key, distribution in trial.distributions.items()
        }
        if len(self._objectives) > 1:
            self._show_all_objectives(shown)
        return shown

    def _show_all_objectives(self, shown: FrozenTrial) -> None:
        """Give a trial the values of all objectives at its last report.

        Of several objectives Optuna has no values on the way, and none of a trial that has ended
        before its end."""
        steps, others = shown.intermediate_values, shown.user_attrs.get(OTHERS, {})
        told = [step for step in steps if str(step) in others]
        shown.intermediate_values, shown.values = {}, None
        if shown.state is TrialState.COMPLETE and told:
            shown.values = [steps[max(told)], *others[str(max(told))]]


def show_study(space: SearchSpace, folder: Path) -> ReadOnlyStudy:
    """Return the study of a results folder, which is not touched. It follows a search that runs.

    Raises:
        UserError: there is no study yet, or the database cannot be reached.
    """
    name = study_name(space, folder)
    if space.study.storage is not None:
        where = space.study.shown_storage
        storage = get_storage(open_database(space.study))
    else:
        path = folder / STUDY_FILE
        where = str(path)
        if not path.is_file():
            raise UserError(f"{folder}: the search has made no study yet (no {STUDY_FILE})")
        with readable(path):  # only ever read: takes no lock
            storage = JournalStorage(JournalFileBackend(str(path)))
    shown = ReadOnlyStudy(storage, name, space)
    if not shown.get_all_studies():
        raise UserError(f"{where} holds no study {name!r}")
    return shown
