"""What Optuna is asked and told, through the real searcher and its real storage."""

import math
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from nanovlm.cluster.relay import (
    FAILURE,
    INFEASIBLE,
    IS_FINAL,
    NUMBER,
    SAMPLES_SEEN,
    VALUES,
)
from nanovlm.cluster.worker_pool import INTERRUPTED, StopSwitch
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import End, TrialRecord, TrialState
from nanovlm.results.read import STUDY_FILE
from nanovlm.search.searcher import StudySearch
from nanovlm.search.study import STUDY_NAME
from tests.full_disk import files_end_at
from tests.records import make_record, make_report

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


SAMPLERS = ["auto", "tpe", "gp", "cmaes", "qmc", "random"]
SETTINGS = {name: {"sampler.name": name, "scheduler.type": "stopping"} for name in SAMPLERS}
"""CMA-ES goes with no other scheduler."""


def searcher_of(searched: SearchSpace, folder: Path, **more: Any) -> StudySearch:
    return StudySearch(searched, folder, 1, more.pop("switch", StopSwitch()), **more)


def ask(searcher: StudySearch, trial_id: str) -> dict[str, Any]:
    suggestion = searcher.suggest(trial_id)
    assert suggestion is not None, "the storage is there"
    return suggestion


def record(number: int, state: TrialState, values: dict[str, Any], **more: Any) -> TrialRecord:
    """A trial with reports of 0.3 at 104 and, unless it failed, 0.5 at 300 samples."""
    reports = [(104, 0.3)] + ([(300, 0.5)] if state != "failed" else [])
    return make_record(
        number,
        state,
        parameters=values,
        reports=[make_report(samples, {"mmstar_accuracy": value}) for samples, value in reports],
        **more,
    )


def result(value: float, samples: int, **more: Any) -> dict[str, Any]:
    return {"mmstar_accuracy": value, SAMPLES_SEEN: samples, **more}


def score(values: dict[str, Any]) -> float:
    """Best at lr_mp = 1e-2."""
    return -abs(math.log10(values["lr_mp"]) + 2)


def suggestions(searcher: StudySearch, num: int) -> list[dict[str, Any]]:
    """Ask for trials one after another, each told its score."""
    asked = []
    for number in range(num):
        suggestion = ask(searcher, f"tune-{number}")
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_seeds_give_equal_trials(tmp_path: Path, sampler: str) -> None:
    runs = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        (tmp_path / folder).mkdir()
        searched = space(
            tmp_path,
            **{"sampler.name": sampler, "scheduler.type": "stopping", "sampler.seed": seed},
        )
        searcher = searcher_of(searched, tmp_path / folder)
        runs.append(suggestions(searcher, 14))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_batch_sizes_are_searched_as_ordered_numbers(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("search: {batch_size: {choice: [256, 64, 128]}}")
    searcher = searcher_of(load_space(tmp_path / "space.yaml"), tmp_path)
    for number in range(3):
        assert ask(searcher, f"tune-{number}")[VALUES]["batch_size"] in (64, 128, 256)
    trials = searcher.study.trials
    order = sorted({(t.params["batch_size"], t.user_attrs[VALUES]["batch_size"]) for t in trials})
    assert order == [(0, 64), (1, 128), (2, 256)]
    whole = optuna.distributions.IntDistribution(0, 2)
    assert all(trial.distributions["batch_size"] == whole for trial in trials)


def test_what_optuna_is_told(tmp_path: Path) -> None:
    searcher = searcher_of(space(tmp_path), tmp_path, milestones=(100, 300))
    for number in range(5):
        searcher.suggest(f"tune-{number}")
    searcher.on_trial_result("tune-0", result(0.3, 100))
    searcher.on_trial_complete("tune-0", result(0.9, 900, **{IS_FINAL: True}))
    searcher.on_trial_result("tune-1", result(0.3, 128))
    searcher.on_trial_complete("tune-1", result(0.4, 320, **{IS_FINAL: False}))
    broken = {FAILURE: "no such file", INFEASIBLE: False}
    searcher.on_trial_complete("tune-2", result(math.nan, 0, **broken))
    searcher.on_trial_complete("tune-3", None, error=True)
    diverged = {FAILURE: "loss is nan", INFEASIBLE: True}
    searcher.on_trial_complete("tune-4", result(math.nan, 0, **diverged))
    searcher.on_trial_complete("tune-4", result(math.nan, 0, **diverged))  # told already

    storage = JournalStorage(JournalFileBackend(str(tmp_path / STUDY_FILE)))
    trials = optuna.load_study(study_name=STUDY_NAME, storage=storage).trials
    told = ["COMPLETE", "PRUNED", "FAIL", "FAIL", "PRUNED"]
    assert [trial.state.name for trial in trials] == told
    assert [trial.value for trial in trials] == [0.9, 0.4, None, None, None]
    assert trials[0].intermediate_values == {100: 0.3, 900: 0.9}
    assert trials[1].intermediate_values == {100: 0.3, 300: 0.4}, "by milestone"
    assert [trial.constraints for trial in trials] == [{}, {}, {}, {}, {"feasible": 1.0}]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str) -> None:
    folders = [tmp_path / "whole", tmp_path / "parts"]
    searched = space(tmp_path, **SETTINGS[sampler])
    for folder in folders:
        folder.mkdir()
    whole = suggestions(searcher_of(searched, folders[0]), 16)
    first = suggestions(searcher_of(searched, folders[1]), 13)
    assert first == whole[:13]
    done = [record(number, "completed", values) for number, values in enumerate(first)]
    again = searcher_of(searched, folders[1], earlier=done)
    assert ask(again, "tune-13")[VALUES] == whole[13]
    again.on_trial_result("tune-13", result(0.1, 50))  # and here the program is killed
    resumed = searcher_of(searched, folders[1], earlier=done)
    assert ask(resumed, "tune-0") == {NUMBER: 13, VALUES: whole[13]}
    resumed.on_trial_result("tune-0", result(0.1, 50))  # made again
    resumed.on_trial_complete("tune-0", result(score(whole[13]), 100, **{IS_FINAL: True}))
    assert ask(resumed, "tune-1") == {NUMBER: 14, VALUES: whole[14]}
    states = [trial.state.name for trial in resumed.study.trials]
    assert states == ["COMPLETE"] * 14 + ["RUNNING"]


def test_trials_under_way_at_an_interruption_stay_open(tmp_path: Path) -> None:
    switch = StopSwitch()
    searcher = searcher_of(space(tmp_path), tmp_path, switch=switch)
    searcher.suggest("tune-0")
    searcher.on_trial_result("tune-0", result(0.3, 100))
    switch.stop(INTERRUPTED)
    searcher.on_trial_complete("tune-0", result(0.3, 100, **{IS_FINAL: False}))
    assert searcher.study.trials[0].state.name == "RUNNING"


def test_a_study_is_brought_in_line_with_the_trials_that_have_ended(tmp_path: Path) -> None:
    searched = space(tmp_path)
    searcher = searcher_of(searched, tmp_path, milestones=(100, 300))
    values = [ask(searcher, f"tune-{number}")[VALUES] for number in range(7)]
    searcher.on_trial_result("tune-1", result(0.3, 104))
    searcher.on_trial_complete("tune-5", result(0.7, 100, **{IS_FINAL: True}))
    states: tuple[TrialState, ...] = ("completed", "stopped", "failed", "failed")
    earlier = [record(number, state, values[number]) for number, state in enumerate(states)]
    earlier[3] = record(3, "failed", values[3], end=End.OUT_OF_MEMORY)
    lost = record(7, "stopped", values[0])  # the study was on a disk that lost power
    searcher.recorder.create(7)  # and here the program was killed
    again = searcher_of(searched, tmp_path, earlier=[*earlier, lost], milestones=(100, 300))
    trials = again.study.trials
    told = ["COMPLETE", "PRUNED", "FAIL", "PRUNED", "RUNNING", "COMPLETE", "RUNNING", "FAIL"]
    assert [trial.state.name for trial in trials] == [*told, "PRUNED"]
    assert [trials[place].value for place in (0, 1, 8)] == [0.5, 0.5, 0.5]
    for trial in (trials[1], trials[8]):
        assert trial.intermediate_values == {100: 0.3, 300: 0.5}
    assert trials[3].constraints == {"feasible": 1.0}
    # 5 has ended for Optuna, but its line is lost; it runs again and is told once.
    for trial_id, number in [("a", 4), ("b", 5), ("c", 6)]:
        assert ask(again, trial_id) == {NUMBER: number, VALUES: values[number]}
    again.on_trial_complete("b", result(0.1, 100, **{IS_FINAL: True}))
    assert again.study.trials[5].value == 0.7
    assert ask(again, "d")[NUMBER] == 8


def test_ends_that_tune_did_not_see_are_told_and_open_trials_stay_open(tmp_path: Path) -> None:
    switch = StopSwitch()
    searcher = searcher_of(space(tmp_path), tmp_path, switch=switch)
    values = [ask(searcher, f"tune-{number}")[VALUES] for number in range(3)]
    switch.stop("the target of 0.5 is reached")
    for number in range(3):
        searcher.on_trial_complete(f"tune-{number}", result(0.3, 100, **{IS_FINAL: False}))
    searcher.end_recorded([record(0, "completed", values[0]), record(1, "stopped", values[1])])
    states = [trial.state.name for trial in searcher.study.trials]
    assert states == ["COMPLETE", "PRUNED", "RUNNING"]


def test_a_sampler_that_fails_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise FloatingPointError("a matrix that is singular")

    for method in ("sample_relative", "sample_independent", "before_trial", "after_trial"):
        monkeypatch.setattr(optuna.samplers.TPESampler, method, fail)
    told: list[str] = []
    searched = space(tmp_path, **{"sampler.name": "tpe"})
    searcher = searcher_of(searched, tmp_path, notify=told.append)
    asked = suggestions(searcher, 4)
    assert len({values["lr_mp"] for values in asked}) == 4
    assert "drawn at random" in caplog.text and "singular" in caplog.text
    reason = "FloatingPointError: a matrix that is singular"
    assert told == [
        f"the tpe sampler failed, and trial 1 is drawn at random: {reason}; see logs/driver.log"
    ]
    assert searcher.recorder.sampler_note() == (
        f"the tpe sampler failed in 3 of 3 suggestions, which were random instead: {reason}"
    )

    monkeypatch.undo()  # it has recovered when the search goes on
    earlier = [record(number, "completed", values) for number, values in enumerate(asked)]
    searcher = searcher_of(searched, tmp_path, earlier=earlier, notify=told.append)
    for number in (4, 5):
        assert ask(searcher, f"tune-{number}")[NUMBER] == number
    assert len(told) == 1
    assert searcher.recorder.sampler_note() == (
        f"the tpe sampler failed in 3 of 5 suggestions, which were random instead: {reason}"
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_does_not_fail_is_not_counted(tmp_path: Path, sampler: str) -> None:
    searcher = searcher_of(space(tmp_path, **SETTINGS[sampler]), tmp_path)
    suggestions(searcher, 14)
    assert searcher.recorder.sampler_note() is None


def test_a_storage_that_is_away_is_no_failure_of_the_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    searcher = searcher_of(space(tmp_path), tmp_path, notify=told.append)
    ask(searcher, "tune-0")
    whole, away = optuna.samplers.TPESampler.sample_relative, iter([True, True, False])

    def sample(*arguments: Any) -> Any:
        if next(away):
            raise OSError("no route to the database")
        return whole(*arguments)

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", sample)
    monkeypatch.setattr(StopSwitch, "pause", lambda switch, seconds: None)
    assert ask(searcher, "tune-1")[NUMBER] == 1
    assert told == ["the study's storage fails, trying again: no route to the database"]
    assert searcher.recorder.sampler_note() is None
    assert [trial.user_attrs[NUMBER] for trial in searcher.study.trials] == [0, 1]


def test_a_failure_of_the_sampler_counts_once_though_the_storage_fails_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise FloatingPointError("a matrix that is singular")

    told: list[str] = []
    searcher = searcher_of(space(tmp_path, **{"sampler.name": "tpe"}), tmp_path, notify=told.append)
    ask(searcher, "tune-0")
    for method in ("sample_relative", "sample_independent"):
        monkeypatch.setattr(optuna.samplers.TPESampler, method, fail)
    whole, away = optuna.Trial.set_user_attr, iter([True])

    def write(trial: optuna.Trial, key: str, value: Any) -> None:
        if key == VALUES and next(away, False):
            raise OSError("no route to the database")
        whole(trial, key, value)

    monkeypatch.setattr(optuna.Trial, "set_user_attr", write)
    monkeypatch.setattr(StopSwitch, "pause", lambda switch, seconds: None)
    assert ask(searcher, "tune-1")[NUMBER] == 1
    assert len(told) == 2 and told[0].startswith("the study's storage fails")
    note = searcher.recorder.sampler_note()
    assert note is not None and "failed in 1 of 1 suggestions" in note


def test_a_storage_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = searcher_of(space(tmp_path), tmp_path)
    whole, failures = searcher.recorder.create, iter([OSError("disk full"), OSError("disk full")])

    def create_when_it_is_back(number: int) -> optuna.Trial:
        for failure in failures:
            raise failure
        return whole(number)

    pauses: list[float] = []
    monkeypatch.setattr(searcher.recorder, "create", create_when_it_is_back)
    monkeypatch.setattr(StopSwitch, "pause", lambda switch, seconds: pauses.append(seconds))
    assert ask(searcher, "tune-0")[NUMBER] == 0
    assert pauses == [1.0, 2.0]


def test_a_storage_that_stays_away_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = StopSwitch()
    searcher = searcher_of(space(tmp_path), tmp_path, switch=switch)

    def fail(number: int) -> optuna.Trial:
        raise OSError("disk full")

    monkeypatch.setattr(searcher.recorder, "create", fail)
    monkeypatch.setattr("nanovlm.search.study_recorder.PATIENCE_SECONDS", 0.0)
    assert searcher.suggest("tune-0") is None
    assert switch.reason == "study.storage: cannot be written: disk full"
    searcher.on_trial_complete("tune-0", None)


def test_a_full_disk_ends_the_search_at_once(tmp_path: Path) -> None:
    switch, told = StopSwitch(), list[str]()
    searcher = searcher_of(space(tmp_path), tmp_path, switch=switch, notify=told.append)
    journal = tmp_path / STUDY_FILE
    before = journal.read_bytes()
    with files_end_at(len(before) + 10):
        assert searcher.suggest("tune-0") is None
        searcher.on_trial_complete("tune-0", None)
    assert isinstance(switch.error, OSError) and "File too large" in str(switch.error)
    assert told == []
    assert journal.read_bytes() == before
    assert ask(searcher_of(space(tmp_path), tmp_path), "tune-0")[NUMBER] == 0


def test_nobody_waits_for_a_storage_once_the_search_is_interrupted() -> None:
    switch = StopSwitch()
    threading.Timer(0.1, switch.stop, ["interrupted"]).start()
    began = time.monotonic()
    switch.pause(60)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("sampler", "most"), [("auto", 4), ("tpe", 8), ("gp", 8), ("cmaes", 20)])
def test_values_that_run_out_of_memory_are_avoided(tmp_path: Path, sampler: str, most: int) -> None:
    """The toy problem: larger batches are a little better, but above 64 memory is not enough."""
    sizes = "{choice: [16, 32, 64, 128, 256, 512]}"
    text = f"search: {{lr_mp: {{log_uniform: [1e-4, 1e-1]}}, batch_size: {sizes}}}"
    (tmp_path / "space.yaml").write_text(f"base: {{batch_size: 32}}\n{text}")
    counts = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        overrides = {"sampler.name": sampler, "scheduler.type": "stopping", "sampler.seed": seed}
        searcher = searcher_of(load_space(tmp_path / "space.yaml", overrides), tmp_path / str(seed))
        num_infeasible = 0
        for number in range(41):
            values = ask(searcher, str(number))[VALUES]
            if values["batch_size"] > 64:
                num_infeasible += number > 10
                failure = {FAILURE: "out of memory", INFEASIBLE: True}
                searcher.on_trial_complete(str(number), result(math.nan, 0, **failure))
            else:
                value = score(values) + 0.1 * math.log2(values["batch_size"])
                searcher.on_trial_complete(str(number), result(value, 100, **{IS_FINAL: True}))
        counts.append(num_infeasible)
    assert sorted(counts)[1] <= most, counts


def test_each_backbone_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    keys = ("lr_mp", "lr_vision_backbone", "lr_language_backbone")
    path = tmp_path / "space.yaml"
    path.write_text("search: {" + ", ".join(f"{key}: default" for key in keys) + "}")
    searched = load_space(path)
    first, *asked = suggestions(searcher_of(searched, tmp_path), 8)
    assert first == {"lr_mp": 2e-3, "lr_vision_backbone": 1e-4, "lr_language_backbone": 1e-4}
    for values in asked:
        peaks = searched.config_for(values).peak_learning_rates
        assert peaks == {key.removeprefix("lr_"): values[key] for key in keys}
        assert len(set(peaks.values())) == 3
