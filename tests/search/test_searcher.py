"""What Optuna is asked and told, through the real OptunaSearch and its real storage."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from nanovlm.distributed.session import INTERRUPTED, StopSwitch
from nanovlm.distributed.trainable import FAILURE, IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.messages import TrialRecord, TrialState
from nanovlm.search.searcher import STUDY_FILE, STUDY_NAME, StudySearch, build_searcher
from nanovlm.search.space import SearchSpace, load_space

SPACE = """
search:
  lr_mp: {log_uniform: [1e-4, 1e-1]}
  warmup_ratio: {uniform: [0.0, 0.1]}
  seed: {int: [0, 5]}
  batch_size: {choice: [64, 256]}
  vlm.lm_dropout: {uniform: [0, 0.2], when: {batch_size: [64]}}
"""


def space(tmp_path: Path, **overrides: Any) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return load_space(path, overrides)


def searcher_of(searched: SearchSpace, folder: Path) -> StudySearch:
    return build_searcher(searched, folder, concurrency=1, switch=StopSwitch())


def result(value: float, samples: int, **more: Any) -> dict[str, Any]:
    return {"mmstar_accuracy": value, SAMPLES_SEEN: samples, **more}


def score(values: dict[str, Any]) -> float:
    """Best at lr_mp = 1e-2."""
    return -abs(math.log10(values["lr_mp"]) + 2)


def suggestions(searcher: StudySearch, num: int) -> list[dict[str, Any]]:
    """Ask for trials one after another, each told its score."""
    asked = []
    for number in range(num):
        suggestion = searcher.suggest(f"tune-{number}")
        assert suggestion[NUMBER] == number
        value = score(suggestion[VALUES])
        searcher.on_trial_complete(f"tune-{number}", result(value, 100, **{IS_FINAL: True}))
        asked.append(suggestion[VALUES])
    return asked


def test_values_are_of_the_space_and_conditions_hold(tmp_path: Path) -> None:
    searched = space(tmp_path)
    asked = suggestions(searcher_of(searched, tmp_path), 30)
    for values in asked:
        searched.config_for(values)  # a configuration that can be
        assert ("vlm.lm_dropout" in values) == (values["batch_size"] == 64)
    assert {values["batch_size"] for values in asked} == {64, 256}


def test_the_first_trial_is_the_default_configuration(tmp_path: Path) -> None:
    searched = space(tmp_path)
    first, second = suggestions(searcher_of(searched, tmp_path), 2)
    assert first == searched.default_values()
    assert second != first


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_equal_seeds_give_equal_trials(tmp_path: Path, sampler: str) -> None:
    runs = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        (tmp_path / folder).mkdir()
        searched = space(tmp_path, **{"sampler.name": sampler, "sampler.seed": seed})
        searcher = searcher_of(searched, tmp_path / folder)
        runs.append(suggestions(searcher, 16))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_what_optuna_is_told(tmp_path: Path) -> None:
    searcher = searcher_of(space(tmp_path), tmp_path)
    for number in range(4):
        searcher.suggest(f"tune-{number}")
    searcher.on_trial_result("tune-0", result(0.3, 100))
    searcher.on_trial_complete("tune-0", result(0.9, 900, **{IS_FINAL: True}))
    searcher.on_trial_result("tune-1", result(0.3, 100))
    searcher.on_trial_complete("tune-1", result(0.4, 300, **{IS_FINAL: False}))
    searcher.on_trial_complete("tune-2", result(math.nan, 0, **{FAILURE: "loss is nan"}))
    searcher.on_trial_complete("tune-3", None, error=True)

    storage = JournalStorage(JournalFileBackend(str(tmp_path / STUDY_FILE)))
    trials = optuna.load_study(study_name=STUDY_NAME, storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert [trial.value for trial in trials] == [0.9, 0.4, None, None]
    assert trials[0].intermediate_values == {100: 0.3, 900: 0.9}
    assert trials[1].intermediate_values == {100: 0.3, 300: 0.4}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str) -> None:
    folders = [tmp_path / "whole", tmp_path / "parts"]
    searched = space(tmp_path, **{"sampler.name": sampler})
    for folder in folders:
        folder.mkdir()
    whole = suggestions(searcher_of(searched, folders[0]), 14)
    first = suggestions(searcher_of(searched, folders[1]), 12)
    assert first == whole[:12]
    again = searcher_of(searched, folders[1])
    assert again.suggest("tune-12")[VALUES] == whole[12]  # and here the program is killed
    resumed = searcher_of(searched, folders[1])
    suggestion = resumed.suggest("tune-13")
    assert suggestion == {NUMBER: 12, VALUES: whole[12]}
    resumed.on_trial_complete("tune-13", result(score(whole[12]), 100, **{IS_FINAL: True}))
    assert resumed.suggest("tune-14") == {NUMBER: 13, VALUES: whole[13]}
    states = [trial.state.name for trial in resumed.study.trials]
    assert states == ["COMPLETE"] * 12 + ["FAIL", "COMPLETE", "RUNNING"]


def test_trials_under_way_at_an_interruption_stay_open(tmp_path: Path) -> None:
    searcher = searcher_of(space(tmp_path), tmp_path)
    searcher.suggest("tune-0")
    searcher.on_trial_result("tune-0", result(0.3, 100))
    searcher.switch.stop(INTERRUPTED)
    searcher.on_trial_complete("tune-0", result(0.3, 100))
    assert searcher.study.trials[0].state.name == "RUNNING"


def test_an_end_that_optuna_was_not_told_is_told_on_resuming(tmp_path: Path) -> None:
    searched = space(tmp_path)
    searcher = searcher_of(searched, tmp_path)
    suggested = [searcher.suggest(f"tune-{number}")[VALUES] for number in range(4)]
    searcher.on_trial_result("tune-1", result(0.3, 100))
    states: tuple[TrialState, ...] = ("completed", "stopped", "failed")
    earlier = [
        TrialRecord(
            trial_id=f"trial-{number}",
            number=number,
            parameters=suggested[number],
            config={},
            state=state,
            metrics={"mmstar_accuracy": 0.5},
            submitted_at=0.0,
        )
        for number, state in enumerate(states)
    ]
    again = build_searcher(searched, tmp_path, 1, StopSwitch(), earlier)
    trials = again.study.trials
    told = ["COMPLETE", "PRUNED", "FAIL", "FAIL", "WAITING"]
    assert [trial.state.name for trial in trials] == told
    assert [trial.value for trial in trials[:2]] == [0.5, 0.3]
    assert again.suggest("tune-4")[VALUES] == suggested[3]


def test_ends_that_tune_did_not_see_are_told_and_open_trials_stay_open(tmp_path: Path) -> None:
    searcher = searcher_of(space(tmp_path), tmp_path)
    for number in range(3):
        searcher.suggest(f"tune-{number}")
        searcher.on_trial_result(f"tune-{number}", result(0.3, 100))
    searcher.switch.stop("the target of 0.5 is reached")
    for number in range(3):
        searcher.on_trial_complete(f"tune-{number}", result(0.3, 100))
    ends: tuple[TrialState, ...] = ("completed", "stopped")
    records = [
        TrialRecord(
            trial_id=f"trial-{number}",
            number=number,
            parameters={},
            config={},
            state=state,
            metrics={"mmstar_accuracy": 0.6},
            submitted_at=0.0,
        )
        for number, state in enumerate(ends)
    ]
    searcher.tell_ended(records)
    assert [trial.state.name for trial in searcher.study.trials] == [
        "COMPLETE",
        "PRUNED",
        "RUNNING",
    ]
    assert [trial.value for trial in searcher.study.trials[:2]] == [0.6, 0.3]
