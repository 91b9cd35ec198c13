"""The LCBench benchmark: its space, its curves and noise, its runs, and what the table says."""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import lcbench_front, lcbench_runs, lcbench_surrogate
from benchmarks.lcbench import find_tasks, parse_arguments
from benchmarks.lcbench_curves import Scale, SurrogateCurves, cached_scale, find_scale
from benchmarks.lcbench_methods import METHODS
from benchmarks.lcbench_runs import Job, Place, Result, missing, read_results, run
from benchmarks.lcbench_space import NUM_QUESTIONS, BenchmarkSpace, benchmark_space
from benchmarks.lcbench_surrogate import CHOOSE, FINAL, KEYS, NUM_EPOCHS
from benchmarks.lcbench_table import difference, estimate, table
from nanovlm.search.plan import plan_milestones

RANGES = {
    "batch_size": (16, 512, True, 91),
    "learning_rate": (1e-4, 0.1, True, 3e-3),
    "momentum": (0.1, 0.99, False, 0.545),
    "weight_decay": (1e-5, 0.1, False, 0.05),
    "num_layers": (1, 5, False, 3),
    "max_units": (64, 1024, True, 256),
    "max_dropout": (0.0, 1.0, False, 0.5),
}
ENTRIES = {
    key: {
        "type": "uniform_int" if isinstance(low, int) else "uniform_float",
        "lower": low,
        "upper": high,
        "log": log,
        "default": default,
    }
    for key, (low, high, log, default) in RANGES.items()
}
SPACE = benchmark_space(ENTRIES)
SCALE = Scale(best=1.0, median=0.5)


class Fake:
    """A surrogate: configurations rise at different rates to 1 - weight_decay - max_dropout / 2."""

    def curve(self, task: str, values: Mapping[str, Any]) -> np.ndarray:
        row = np.array([float(values[key]) for key in KEYS])
        return self.accuracies(task, np.tile(row, (NUM_EPOCHS, 1)), np.arange(1, NUM_EPOCHS + 1))

    def accuracies(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray:
        columns = dict(zip(KEYS, configurations.T, strict=True))
        end = 1 - columns["weight_decay"] - columns["max_dropout"] / 2
        share = np.asarray(epochs) / NUM_EPOCHS
        return np.asarray(end * share ** (0.1 * columns["num_layers"]))


def curves(noise_seed: int | None = None) -> SurrogateCurves:
    return SurrogateCurves(Fake(), "3945", SPACE.parameters, SCALE, noise_seed)


def job(**changes: Any) -> Job:
    base = Job("random, full", "3945", 0, 8, False, None, trainings=2)
    return dataclasses.replace(base, **changes)


def result(regret: float, **changes: Any) -> Result:
    regrets = {"last": {1: 1.0, 2: regret}, "furthest": {1: 1.0, 2: 1.0}}
    return Result(job(**changes), regrets, 16, 2, 1.0, 0.5, 1.0)


def test_the_space_is_the_benchmarks() -> None:
    assert [p.key for p in SPACE.parameters] == list(RANGES)
    kinds = ["log_int", "log_uniform", "uniform", "uniform", "int", "log_int", "uniform"]
    assert [p.kind for p in SPACE.parameters] == kinds
    assert all(p.contains(SPACE.default_values()[p.key]) for p in SPACE.parameters)
    assert isinstance(dataclasses.replace(SPACE, name="other"), BenchmarkSpace)


def test_milestones_are_epochs() -> None:
    rungs = dataclasses.replace(SPACE, scheduler=SPACE.scheduler.model_copy(update={"rungs": 4}))
    table = curves()
    milestones = plan_milestones(rungs, table.budget)
    assert [table.column(0, milestone) + 1 for milestone in milestones] == [2, 6, 18]
    assert table.column_of_share(6 / 52) + 1 == 6 and table.column(0, table.budget) == table.last


def test_the_tasks_are_named_once() -> None:
    assert (len(CHOOSE), len(FINAL), len({*CHOOSE, *FINAL})) == (17, 18, 35)


def test_regret_is_without_noise() -> None:
    exact, noisy = curves(), curves(noise_seed=1)
    for one in (exact, noisy):
        row = one.row_of({**SPACE.default_values(), "max_dropout": 0.4, "weight_decay": 0.1})
        assert one.regret(row) == pytest.approx(0.6)
    assert exact.value(0, exact.last) == pytest.approx(0.7)
    assert noisy.value(0, noisy.last) != pytest.approx(0.7)


def test_noise_is_that_of_the_questions_and_the_same_again() -> None:
    def values(seed: int) -> list[float]:
        table = curves(noise_seed=seed)
        rows = [table.row_of(SPACE.default_values()) for _ in range(400)]
        return [table.value(row, table.last) for row in rows]

    assert values(3) == values(3) and values(3) != values(4)
    true = 0.7
    assert np.mean(values(3)) == pytest.approx(true, abs=0.003)
    expected = math.sqrt(true * (1 - true) / NUM_QUESTIONS)
    assert np.std(values(3)) == pytest.approx(expected, rel=0.15)


def test_the_scale_finds_the_corner(tmp_path: Path) -> None:
    scale = find_scale(Fake(), "3945", SPACE.parameters)
    assert scale.best == pytest.approx(1 - 1e-5, abs=1e-6)
    assert scale.median == pytest.approx(0.7, abs=0.01)
    assert scale.regret(scale.median) == 1 and scale.regret(scale.best) == 0
    assert cached_scale(tmp_path, Fake(), "3945", SPACE.parameters) == scale
    (tmp_path / "scale-3945.json").write_text(json.dumps({"best": 0.9, "median": 0.1}))
    assert cached_scale(tmp_path, Fake(), "3945", SPACE.parameters) == Scale(0.9, 0.1)


def test_the_model_takes_the_epoch_and_then_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert inputs["x_cat"].dtype == np.int32 and (inputs["x_cat"] == 7).all()
            assert inputs["x_cont"].dtype == np.float32
            np.testing.assert_allclose(inputs["x_cont"][:, 1:], [[1, 2, 3, 4, 5, 6, 7]] * 52)
            return [np.stack([np.full(52, -1), inputs["x_cont"][:, 0]], axis=1)]

    monkeypatch.setattr(lcbench_surrogate.onnxruntime, "InferenceSession", Session)
    (tmp_path / "encoding.json").write_text('{"OpenML_task_id": {"3945": 7}}')
    (tmp_path / "config_space.json").write_text('{"hyperparameters": [{"name": "epoch"}]}')
    surrogate = lcbench_surrogate.Surrogate(tmp_path)
    curve = surrogate.curve("3945", {key: place for place, key in enumerate(KEYS, start=1)})
    np.testing.assert_allclose(curve, np.arange(1, 53) / 100)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(lcbench_runs, "load", lambda data: (Fake(), SPACE))
    (tmp_path / "scale-3945.json").write_text(json.dumps({"best": 1.0, "median": 0.5}))
    return Place(data=tmp_path, cache=tmp_path)


OURS = [name for name in METHODS if not name.startswith("syne")]


@pytest.mark.parametrize("name", OURS)
def test_each_method_runs(name: str, place: Place) -> None:
    wanted = job(method=name, slots=2)
    found = run(wanted, place)
    assert found.job == wanted and 0 < found.used <= 1
    for regrets in found.regrets.values():
        assert list(regrets) == [1, 2]
        assert all(-0.01 < regret <= 1.1 for regret in regrets.values())
    again = run(wanted, place)
    assert again.regrets == found.regrets, "a run is the same again"


def test_a_run_in_full_picks_the_best_of_its_trainings(place: Place) -> None:
    one, eight = (run(job(slots=1, trainings=n), place).regrets["last"] for n in (1, 8))
    assert one[1] == eight[1] and eight[8] < eight[1]
    slots = run(job(slots=8, trainings=8), place).regrets["last"]
    assert slots[4] == 1 and slots[8] == eight[8], "all 8 end at once"


def test_each_task_has_random_draws_of_its_own() -> None:
    seeds = [job(task=task, seed=seed).own_seed for task in CHOOSE for seed in range(3)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32


def test_with_costs_a_search_gets_less_done(place: Place) -> None:
    name = "tpe + asha, stopping"
    free, dear = (
        run(job(method=name, trainings=4, training_seconds=seconds), place)
        for seconds in (None, 0.2)
    )
    assert dear.num_trials < free.num_trials and dear.used < 0.95 < free.used


def test_a_run_is_kept_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_results(path) == []
    kept = result(0.4)
    path.write_text(kept.to_line())
    (read,) = read_results(path)
    assert read == kept
    again, shorter, longer = job(), job(trainings=1), job(trainings=4)
    others = [job(seed=1), job(slots=1), job(noise=True), job(training_seconds=60.0)]
    assert list(missing([again, shorter, longer, *others], [kept])) == [longer, *others]


def test_paired_differences() -> None:
    one = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.9}
    other = {("a", 0): 0.1, ("a", 1): 0.1, ("c", 0): 0.3}
    found = difference(one, other)
    assert found is not None and found.size == 2
    assert found.mean == pytest.approx(0.5) and found.error == pytest.approx(0.1)
    assert difference(one, {}) is None
    single = estimate([0.5])
    assert single is not None and math.isnan(single.error)


def test_the_table() -> None:
    name = "few, then top"
    results = [result(regret, seed=seed) for seed, regret in enumerate((0.3, 0.5))]
    results += [result(0.2, seed=0, method=name), result(0.9, seed=1, method=name, slots=1)]
    jobs = [job(method=m, seed=s) for m in ("random, full", name) for s in (0, 1)]
    _, full, few, _, less = table(results, jobs, "last", against="random, full")
    assert full.split()[2:7] == ["2", "1.000", "(0.000)", "0.400", "(0.100)"]
    assert few.split()[3:8] == ["1", "1.000", "(nan)", "0.200", "(nan)"]
    assert less.split()[3:8] == ["1", "+0.000", "(nan)", "-0.100", "(nan)"]
    assert table(results, [*jobs, job(method="stock optuna + asha")], "last", name)[1:3] == [
        full,
        few,
    ]
    assert "0.400" not in "".join(table(results, jobs, "furthest", against=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choose", "17"], "--tasks: must be choose, final or one of 167168, .*got 17"),
        (["--methods", "syne tune, asha"], "--peer-python: must be given for syne tune, asha"),
        ([], "--data: .* must hold model.onnx, .*; no model.onnx there"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["lcbench.py", "--data", str(tmp_path), "--out", "runs.jsonl", *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments()
    assert re.search(message, capsys.readouterr().err)


def test_tasks_are_taken_once() -> None:
    parser = argparse.ArgumentParser()
    assert find_tasks(parser, ["choose", "3945", "34539"]) == [*CHOOSE, "34539"]


class Timed(Fake):
    """What dropout costs in accuracy it saves in time, up to a factor of ten."""

    def seconds(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray:
        return np.asarray(epochs * 10 ** -configurations[:, KEYS.index("max_dropout")])


@pytest.mark.parametrize("method", lcbench_front.METHODS)
def test_how_much_of_a_front_is_found(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lcbench_front, "load", lambda data: (Timed(), SPACE))
    monkeypatch.setattr(lcbench_front, "_NUM_SAMPLED", 500)
    found = [lcbench_front.regrets(method, "3945", 0, tmp_path, 2, 8) for _ in range(2)]
    assert found[0] == found[1] and list(found[0]) == [4, 8], "a run is the same again"
    assert 0 <= found[0][8] <= found[0][4] <= 1
    assert found[0][8] < 0.6 or "auto" in method, "which begins with what is cheap or dear"


def test_the_best_known_front_reaches_both_ends() -> None:
    front = lcbench_front.find_front(Timed(), "3945", SPACE)
    dropout = np.linspace(0, 0.55, 500)  # of random configurations the median is at 0.3
    best = np.stack([dropout / 2 - 1, np.log(10**-dropout / 1000)], axis=1)
    assert abs(front.regret(best)) < 0.01
    assert front.regret(best[:1]) > 0.5 and front.regret(np.empty((0, 2))) == 1
