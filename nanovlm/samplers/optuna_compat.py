"""What this project uses of Optuna's private parts, all of it.

`tests/samplers/test_optuna_compat.py` names what breaks when Optuna changes one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

METRIC_NAMES = "study:metric_names"
"""System attribute of a study: the names of its objectives."""


class StudyView(optuna.Study):
    """A study whose samplers see the given trials and no others."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self._seen = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Any = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._seen if states is None or trial.state in states]


def create_trial(study: optuna.Study, attributes: Mapping[str, Any]) -> optuna.Trial:
    """Return a new trial, which the storage gets together with its attributes. `Study.ask` writes a
    trial without any, which nobody can tell from others if the program ends there."""
    template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    return _opened(study, study._storage.create_new_trial(study._study_id, template))


def running_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return a trial of the study that may lack values; the study's sampler suggests those."""
    return _opened(study, trial._trial_id)


def _opened(study: optuna.Study, trial_id: int) -> optuna.Trial:
    study._thread_local.cached_all_trials = None  # samplers see what other programs wrote
    return optuna.Trial(study, trial_id)


def reopen_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return a running trial of the study that can report again; it has all its values."""
    study.sampler = optuna.samplers.RandomSampler()  # Optuna asks it, though nothing is to be drawn
    return running_trial(study, trial)


def set_system_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Write an attribute that only samplers read to a trial which is being suggested."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def with_objectives(study: FrozenStudy, directions: Mapping[str, StudyDirection]) -> FrozenStudy:
    """Return what a storage lists of a study, with these objectives.

    Args:
        directions: by the names of the metrics.
    """
    return FrozenStudy(
        study.study_name,
        direction=None,
        directions=list(directions.values()),
        user_attrs=study.user_attrs,
        system_attrs={**study.system_attrs, METRIC_NAMES: list(directions)},
        study_id=study._study_id,
    )
