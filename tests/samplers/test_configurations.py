"""Configurations of finite and infinite spaces: counted, walked through, and not run twice."""

import itertools
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

from nanovlm.cluster.relay import FAILURE, INFEASIBLE, IS_FINAL, SAMPLES_SEEN, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.parameter import count_configurations
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import End, TrialRecord, TrialState
from nanovlm.samplers.configurations import can_repeat, nearest_first
from nanovlm.search import study as study_module
from nanovlm.search.limits import RunConfigurations
from nanovlm.search.searcher import StudySearch
from tests.records import make_record

SIX = "batch_size: {choice: [64, 128, 256]}, freeze: {choice: [none, vision_encoder]}"
CONDITIONAL = """batch_size: {choice: [64, 128, 256]},
  seed: {int: [0, 4], when: {batch_size: [64]}},
  freeze: {choice: [none, backbones], when: {seed: [1, 2]}},
  lr_schedule: {choice: [cosine, linear, constant], when: {batch_size: [64, 128]}}"""
MIXED = "freeze: {choice: [none, backbones]}, lr_mp: {uniform: [0, 1], when: {freeze: [none]}}"
SAMPLERS = ["auto", "tpe", "gp", "cmaes", "qmc", "random"]
STOPPING = {"scheduler.type": "stopping"}
"""CMA-ES goes with no other."""


def space_of(folder: Path, search: str, **overrides: Any) -> SearchSpace:
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(f"search: {{{search}}}\n")
    return load_space(folder / "space.yaml", overrides)


@pytest.mark.parametrize(
    ("search", "number"),
    [
        ("seed: {choice: [0]}", 1),
        (SIX, 6),
        ("seed: {int: [0, 9]}, batch_size: {choice: [64, 256]}", 20),
        ("seed: {log_int: [1, 8]}", 8),
        (CONDITIONAL, 1 + 3 + 3 * (3 + 2 * 2)),
        ("seed: {int: [0, 1000000000]}", 1_000_000_001),
        ("lr_mp: {uniform: [0, 1]}", None),
        (MIXED, None),
    ],
)
def test_the_number_of_configurations(tmp_path: Path, search: str, number: int | None) -> None:
    base = {"base.seed": 1} if "log_int" in search else {}
    space = space_of(tmp_path, search, **base)
    assert count_configurations(space.parameters) == number
    if number is None or number > 1000:
        return
    walked = list(nearest_first(space.parameters, space.default_values(), draw=lambda p: None))
    assert walked[0] == space.default_values()
    assert len(walked) == len({str(values) for values in walked}) == number
    assert all(space.config_for(values) for values in walked)


def test_the_nearest_configurations_come_first(tmp_path: Path) -> None:
    parameters = space_of(
        tmp_path, "batch_size: {choice: [256, 64, 128]}, seed: default"
    ).parameters
    walk = nearest_first(parameters, {"batch_size": 128, "seed": 3}, draw=lambda p: None)
    first = [(values["batch_size"], values["seed"]) for values in itertools.islice(walk, 11)]
    assert first[:3] == [(128, 3), (128, 2), (128, 4)]
    assert {size for size, _ in first[:10]} == {128} and first[10] == (64, 3)


def test_only_a_continuous_key_that_is_always_active_rules_repeats_out(tmp_path: Path) -> None:
    assert can_repeat(space_of(tmp_path, SIX).parameters)
    assert can_repeat(space_of(tmp_path, MIXED).parameters)
    assert not can_repeat(space_of(tmp_path, f"{SIX}, lr_mp: default").parameters)


def record(number: int, state: TrialState, values: dict[str, Any], **more: Any) -> TrialRecord:
    return make_record(number, state, {"mmstar_accuracy": 0.5}, parameters=values, **more)


def test_what_counts_as_run(tmp_path: Path) -> None:
    space = space_of(tmp_path, "seed: {int: [0, 5]}")
    records = [
        record(0, "completed", {"seed": 0}),
        record(1, "stopped", {"seed": 1}),
        record(2, "stopped", {"seed": 2}, end=End.SEARCH_ENDED),
        record(3, "failed", {"seed": 3}, end=End.OUT_OF_MEMORY),
        record(4, "failed", {"seed": 4}, reason="no image left"),
    ]
    run = RunConfigurations(space, records)
    assert [run.has_run({"seed": seed}) for seed in range(6)] == [1, 1, 0, 1, 0, 0]
    assert run.num_left == 3 and run.reason_to_end() is None
    for seed in (2, 5):
        run.begin({"seed": seed})
    run.fail({"seed": 4})
    assert run.num_left == 0
    assert run.reason_to_end() == (
        "the space is used up: all 6 configurations have run, 1 of them failed 2 times"
    )
    only = RunConfigurations(space_of(tmp_path, "seed: {choice: [0]}"), records[:1])
    assert only.reason_to_end() == "the space is used up: its only configuration has run"


def searcher_of(space: SearchSpace, folder: Path, **more: Any) -> StudySearch:
    folder.mkdir(exist_ok=True)
    return StudySearch(space, folder, more.pop("slots", 1), StopSwitch(), **more)


def ask(searcher: StudySearch, trial_id: str) -> Any:
    """Return values, None while there is something to wait for, or FINISHED."""
    suggestion: Any = searcher.suggest(trial_id)
    return suggestion[VALUES] if isinstance(suggestion, dict) else suggestion


def end(searcher: StudySearch, trial_id: str, values: dict[str, Any]) -> None:
    """Tell the end of a full trial; the best one is batch_size 256 with nothing frozen."""
    value = values.get("batch_size", 64) / 1000 + (values.get("freeze") == "none")
    result = {"mmstar_accuracy": value, SAMPLES_SEEN: 900, IS_FINAL: True}
    searcher.on_trial_complete(trial_id, result)


def run_to_end(searcher: StudySearch, slots: int = 1) -> list[dict[str, Any]]:
    """Run trials as Tune does, so many at once, until there are none; return their values."""
    asked: list[dict[str, Any]] = []
    running: dict[str, dict[str, Any]] = {}
    while len(asked) < 100:
        values = ask(searcher, f"tune-{len(asked)}") if len(running) < slots else None
        if values == Searcher.FINISHED:
            assert not running
            return asked
        if values is None:
            trial_id = next(iter(running))
            end(searcher, trial_id, running.pop(trial_id))
        else:
            running[f"tune-{len(asked)}"] = values
            asked.append(values)
    return asked


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_finite_space_is_run_once_and_then_used_up(
    tmp_path: Path, sampler: str, slots: int
) -> None:
    runs = []
    for name in ("one", "two"):
        space = space_of(tmp_path, SIX, **{"sampler.name": sampler, **STOPPING})
        searcher = searcher_of(space, tmp_path / name, slots=slots)
        runs.append(run_to_end(searcher, slots))
        assert searcher.reason_to_end() == "the space is used up: all 6 configurations have run"
    assert runs[0] == runs[1], "it repeats"
    assert runs[0][0] == space.default_values()
    assert len(runs[0]) == len({str(values) for values in runs[0]}) == 6
    assert [trial.state.name for trial in searcher.study.trials] == ["COMPLETE"] * 6


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_space_with_conditions_is_run_once(tmp_path: Path, sampler: str) -> None:
    space = space_of(tmp_path, CONDITIONAL, **{"sampler.name": sampler, **STOPPING})
    asked = run_to_end(searcher_of(space, tmp_path), slots=2)
    assert len(asked) == len({str(values) for values in asked}) == 25
    for values in asked:
        assert ("seed" in values) == (values["batch_size"] == 64)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_finite_part_of_an_infinite_space_is_run_once(tmp_path: Path, sampler: str) -> None:
    space = space_of(tmp_path, MIXED, **{"sampler.name": sampler, **STOPPING})
    searcher = searcher_of(space, tmp_path)
    asked = []
    for number in range(14):
        values = ask(searcher, str(number))
        asked.append(values)
        # What is frozen decides, so each sampler would take `backbones` again and again.
        value = float(values["freeze"] == "backbones")
        result = {"mmstar_accuracy": value, SAMPLES_SEEN: 900, IS_FINAL: True}
        searcher.on_trial_complete(str(number), result)
    assert sum(values["freeze"] == "backbones" for values in asked) == 1
    assert len({str(values) for values in asked}) == 14


def test_a_large_space_is_not_walked_through(tmp_path: Path) -> None:
    space = space_of(tmp_path, "seed: {int: [0, 1000000000000]}", **{"sampler.name": "random"})
    searcher = searcher_of(space, tmp_path)
    assert len({ask(searcher, str(number))["seed"] for number in range(20)}) == 20


def test_trials_that_failed_by_accident_are_tried_again_once(tmp_path: Path) -> None:
    searcher = searcher_of(space_of(tmp_path, "seed: {int: [0, 2]}"), tmp_path)
    failures = {0: "no image left", 1: "out of memory"}
    tried: list[int] = []
    while (values := ask(searcher, str(len(tried)))) != Searcher.FINISHED:
        seed = values["seed"]
        if reason := failures.get(seed):
            result = {"mmstar_accuracy": math.nan, SAMPLES_SEEN: 0, FAILURE: reason}
            searcher.on_trial_complete(str(len(tried)), result | {INFEASIBLE: seed == 1})
        else:
            end(searcher, str(len(tried)), values)
        tried.append(seed)
    assert sorted(tried) == [0, 0, 1, 2]
    assert searcher.reason_to_end() == (
        "the space is used up: all 3 configurations have run, 1 of them failed 2 times"
    )


def test_the_last_running_trial_is_waited_for(tmp_path: Path) -> None:
    searcher = searcher_of(space_of(tmp_path, "seed: {choice: [0]}"), tmp_path, slots=2)
    values = ask(searcher, "a")
    assert ask(searcher, "b") is None and searcher.reason_to_end() is None
    searcher.on_trial_complete("a", None, error=True)
    assert ask(searcher, "b") == values
    end(searcher, "b", values)
    assert ask(searcher, "c") == Searcher.FINISHED


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_done", [2, 5])
def test_a_finite_space_that_is_gone_on_with(tmp_path: Path, sampler: str, num_done: int) -> None:
    space = space_of(tmp_path, SIX, **{"sampler.name": sampler, **STOPPING})
    whole = run_to_end(searcher_of(space, tmp_path / "whole"))
    first = searcher_of(space, tmp_path / "parts")
    for number in range(num_done):
        end(first, str(number), ask(first, str(number)))
    first.suggest("killed")  # and here the program is killed
    done = [record(number, "completed", values) for number, values in enumerate(whole[:num_done])]
    assert run_to_end(searcher_of(space, tmp_path / "parts", earlier=done)) == whole[num_done:]
    everything = [record(number, "completed", values) for number, values in enumerate(whole)]
    assert run_to_end(searcher_of(space, tmp_path / "parts", earlier=everything)) == []


def test_what_another_search_of_the_study_has_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(study_module, "open_database", lambda study: storage)
    database = {"study.storage": "postgresql://host/db", "study.name": "shared"}
    space = space_of(tmp_path, SIX, **database)
    one, other = (searcher_of(space, tmp_path / name) for name in ("one", "other"))
    first = [ask(one, str(number)) for number in range(3)]
    for number, values in enumerate(first[:2]):  # the third one still runs there
        end(one, str(number), values)
    asked = run_to_end(other)
    assert asked[0] == first[0] == space.default_values(), "each runs the default one"
    assert len(asked) == len({str(values) for values in asked}) == 5
    assert first[1] not in asked and first[2] in asked
    assert other.reason_to_end() == "the space is used up: all 6 configurations have run"
    end(one, "2", first[2])
    assert run_to_end(one) == []
