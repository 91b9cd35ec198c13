"""Optuna's private parts that this project uses: a failure names what a new version has changed."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler, GPSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from nanovlm.samplers.optuna_compat import (
    METRIC_NAMES,
    StudyView,
    create_trial,
    reopen_trial,
    running_trial,
    set_system_attr,
    with_objectives,
)

SPACE = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


def study_of(num_trials: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for number in range(num_trials):
        trial = study.ask(dict(SPACE))
        study.tell(trial, number / 10)
    return study


@pytest.mark.parametrize("kind", [TPESampler, GPSampler, CmaEsSampler])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_read_trials_with_get_trials_of_the_study(kind: type) -> None:
    """`Study._get_trials`: if a sampler reads its trials otherwise, it sees those left out."""
    study = study_of(6)
    study.ask()
    *ended, trial = study.trials
    sampler = kind(seed=0, n_startup_trials=3)
    assert sampler.sample_relative(StudyView(study, ended), trial, dict(SPACE))
    assert not sampler.sample_relative(StudyView(study, ended[:2]), trial, dict(SPACE))


def test_a_view_is_a_study_of_its_own() -> None:
    """`Study.__dict__`: it holds the storage, the direction and whatever else a study has."""
    study = study_of(4)
    view = StudyView(study, study.trials[:3])
    assert [trial.number for trial in view.trials] == [0, 1, 2]
    assert view.get_trials(states=[optuna.trial.TrialState.RUNNING]) == []
    assert view.direction == study.direction and view.study_name == study.study_name
    assert len(study.trials) == 4


def test_a_trial_is_created_with_its_attributes() -> None:
    """`Study._storage`, `create_new_trial`, `_study_id`, and the cache that `Study.ask` empties."""
    study = study_of(6)
    study.sampler = TPESampler(seed=0, n_startup_trials=3)
    trial = create_trial(study, {"number": 3})
    (frozen,) = study.get_trials(states=[TrialState.RUNNING])
    assert frozen.user_attrs == {"number": 3} and frozen.datetime_start is not None
    x = trial.suggest_float("x", 0.0, 1.0)
    again = running_trial(study, frozen)
    assert again.suggest_float("x", 0.0, 1.0) == x
    again.suggest_float("y", 0.0, 1.0)
    (frozen,) = study.get_trials(states=[TrialState.RUNNING])
    assert frozen.params.keys() == {"x", "y"} and frozen.params["x"] == x


def test_a_reopened_trial_reports_and_ends() -> None:
    """`FrozenTrial._trial_id`, of which a `Trial` is made."""
    study = optuna.create_study()
    study.ask(dict(SPACE))
    (frozen,) = study.trials
    reopened = reopen_trial(study, frozen)
    reopened.report(0.5, step=3)
    reopened.set_constraint("feasible", 1.0)
    assert reopened.params == frozen.params and "feasible" in reopened.constraints
    study.tell(frozen.number, 0.7)
    assert study.trials[0].intermediate_values == {3: 0.5} and study.trials[0].value == 0.7


def test_a_sampler_can_note_something_on_a_trial() -> None:
    """`Study._storage` and `set_trial_system_attr`."""
    study = optuna.create_study()
    study.ask()
    set_system_attr(study, study.trials[0], "noted", {"a": 0.5})
    assert study.trials[0].system_attrs["noted"] == {"a": 0.5}


def test_a_listed_study_gets_other_objectives() -> None:
    """`FrozenStudy`, `_study_id`, and the attribute from which `Study.metric_names` come."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="one")
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["loss"])
    (listed,) = storage.get_all_studies()
    assert listed.system_attrs[METRIC_NAMES] == ["loss"]
    both = {"a": StudyDirection.MAXIMIZE, "b": StudyDirection.MINIMIZE}
    found = with_objectives(listed, both)
    assert found.directions == [*both.values()] and found.system_attrs[METRIC_NAMES] == ["a", "b"]
    assert (found.study_name, found._study_id) == ("one", listed._study_id)
