"""What this project uses of Optuna's private parts, all of it.

`tests/samplers/test_optuna_compat.py` names what breaks when Optuna changes one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

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


def reopen_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return a running trial of the study that can report again; it has all its values."""
    study.sampler = optuna.samplers.RandomSampler()  # Optuna asks it, though nothing is to be drawn
    return optuna.Trial(study, trial._trial_id)


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
