"""A study that is only looked at: true values, always current, and nothing ever written."""

import inspect
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage

from nanovlm.cluster.relay import IS_FINAL, SAMPLES_SEEN
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.results.read import STUDY_FILE
from nanovlm.samplers.configurations import suggest
from nanovlm.search.searcher import StudySearch
from nanovlm.search.study import ReadOnly, ReadOnlyStudy, open_study, show_study

SPACE = """
search:
  lr_mp: {log_uniform: [1e-4, 1e-1]}
  batch_size: {choice: [256, 64, 128]}
  lr_schedule: default
"""


def space(folder: Path, **overrides: Any) -> SearchSpace:
    (folder / "space.yaml").write_text(SPACE)
    return load_space(folder / "space.yaml", overrides)


def running_study(searched: SearchSpace, folder: Path) -> optuna.Study:
    place = open_study(searched, folder)
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.load_study(study_name=place.name, storage=place.storage, sampler=sampler)


def run_trial(study: optuna.Study, searched: SearchSpace) -> dict[str, Any]:
    trial = study.ask()
    values = suggest(searched.parameters, trial)
    trial.report(0.1, step=100)
    study.tell(trial, 0.01 * trial.number)
    return values


def test_trials_are_shown_with_their_true_values_as_they_come(tmp_path: Path) -> None:
    searched = space(tmp_path)
    study = running_study(searched, tmp_path)
    run_trial(study, searched)
    shown = show_study(searched, tmp_path)
    expected = [shown.get_all_trials(0)[0].params]
    for number in range(1, 12):
        expected.append(run_trial(study, searched))
        trial = shown.get_all_trials(0)[-1]
        assert (trial.number, trial.params) == (number, expected[-1])
    assert [trial.params for trial in shown.get_all_trials(0)] == expected
    assert {params["batch_size"] for params in expected} == {64, 128, 256}
    assert trial.distributions["batch_size"] == CategoricalDistribution((64, 128, 256))
    assert trial.distributions["lr_mp"] == study.trials[-1].distributions["lr_mp"]
    assert shown.get_trial(11).params == expected[-1]
    assert shown.get_best_trial(0).number == 11
    # What the search itself sees has not changed.
    assert {type(t.params["batch_size"]) for t in study.trials} == {int}
    assert {t.params["batch_size"] for t in study.trials} == {0, 1, 2}


def test_the_objective_has_its_name(tmp_path: Path) -> None:
    searched = space(tmp_path, **{"objective.metric": "val_loss", "objective.mode": "min"})
    running_study(searched, tmp_path)
    shown = optuna.load_study(study_name="search", storage=show_study(searched, tmp_path))
    assert (shown.metric_names, shown.direction.name) == (["val_loss"], "MINIMIZE")


def write_methods() -> list[str]:
    methods = inspect.getmembers(BaseStorage, inspect.isfunction)
    names = ("create", "set", "delete")
    return [name for name, _ in methods if name.partition("_")[0] in names]


@pytest.mark.parametrize("method", write_methods())
def test_nothing_can_be_written(tmp_path: Path, method: str) -> None:
    searched = space(tmp_path)
    run_trial(running_study(searched, tmp_path), searched)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    shown = show_study(searched, tmp_path)
    signature = inspect.signature(getattr(BaseStorage, method))
    with pytest.raises(ReadOnly, match="nothing can be written"):
        getattr(shown, method)(*(0 for _ in list(signature.parameters)[1:]))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    searched = space(tmp_path)
    study = running_study(searched, tmp_path)
    run_trial(study, searched)
    shown = show_study(searched, tmp_path)
    before = (tmp_path / STUDY_FILE).stat().st_size
    run_trial(study, searched)
    whole = (tmp_path / STUDY_FILE).read_bytes()
    for size in range(before, len(whole), 7):
        (tmp_path / STUDY_FILE).write_bytes(whole[:size])
        assert 1 <= len(shown.get_all_trials(0)) <= 2
    (tmp_path / STUDY_FILE).write_bytes(whole)
    assert [trial.value for trial in shown.get_all_trials(0)] == [0.0, 0.01]


def test_a_study_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    searched = space(tmp_path)
    with pytest.raises(UserError, match="has made no study yet"):
        show_study(searched, tmp_path)
    running_study(searched, tmp_path)
    with pytest.raises(UserError, match="holds no study 'other'"):
        show_study(space(tmp_path, **{"study.name": "other"}), tmp_path)
    assert isinstance(show_study(searched, tmp_path), ReadOnlyStudy)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"space.yaml", STUDY_FILE, "study.id"}


def test_of_several_objectives_all_are_shown(tmp_path: Path) -> None:
    """As a study that Optuna has for them, so that the dashboard draws their front."""
    both = [{"metric": "mmstar_accuracy"}, {"metric": "seconds_per_sample"}]
    searched = space(tmp_path, objective=both)
    searcher = StudySearch(searched, tmp_path, 1, StopSwitch(), (100,))
    for number, (accuracy, seconds) in enumerate([(0.5, 0.01), (0.7, 0.02), (0.6, 0.03)]):
        searcher.suggest(str(number))
        for samples, is_final in ((100, False), (300, True)):
            result: dict[str, Any] = {SAMPLES_SEEN: samples, IS_FINAL: is_final}
            result |= {"mmstar_accuracy": accuracy * samples, "seconds_per_sample": seconds}
            if not is_final:
                searcher.on_trial_result(str(number), result)
        searcher.on_trial_complete(str(number), result)
    searcher.suggest("3")
    shown = optuna.load_study(study_name="search", storage=show_study(searched, tmp_path))
    assert shown.metric_names == ["mmstar_accuracy", "seconds_per_sample"]
    assert [direction.name for direction in shown.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in shown.trials] == [
        [150.0, 0.01], [210.0, 0.02], [180.0, 0.03], None
    ]  # fmt: skip
    assert [trial.number for trial in shown.best_trials] == [0, 1]
    assert searcher.study.directions == [optuna.study.StudyDirection.MAXIMIZE]
    assert searcher.study.trials[0].intermediate_values == {100: 50.0, 300: 150.0}
