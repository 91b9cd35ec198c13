"""The dry run's figures: counted by hand where the scheduler stops nothing."""

import math
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.space import SearchSpace, load_space
from nanovlm.files import gib
from nanovlm.records import record_line
from nanovlm.search.forecast import Forecast, Range, past_rate
from nanovlm.search.plan import SearchPlan
from tests.records import make_record, make_report, make_speed

DATA = {"training": {"images": 2**20}, "benchmark": {"images": 2**10, "samples": 100}}
CUDA_FREE = {"resources.workers": 1, "resources.gpus_per_worker": 0}


def space_of(folder: Path, **overrides: Any) -> SearchSpace:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "space.yaml"
    path.write_text("preset: digits\nsearch: {lr_mp: default}\n")
    return load_space(path, CUDA_FREE | overrides)


def full_length(
    tmp_path: Path, rate: float | None, concurrency: int = 2, **overrides: Any
) -> Forecast:
    """Return the forecast of trials of 3,600 samples that all run their full budget."""
    space = space_of(tmp_path / "spaces", **{"scheduler.name": "none"}, **overrides)
    plan = SearchPlan(space, (), 3600, DATA)
    return Forecast(plan, concurrency, rate, tmp_path / "results")


def earlier_search(results: Path, speeds: list[float], **overrides: Any) -> None:
    space = space_of(results / "earlier", **overrides)
    (results / "earlier" / "space.yaml").write_text(space.to_yaml())
    reports = [
        make_report(100, {}, speed=make_speed(samples_per_second=speed), evaluation_seconds=5.0)
        for speed in speeds
    ]
    record = make_record(0, reports=[*reports, make_report(200, {})])  # the last one not measured
    (results / "earlier" / "trials.jsonl").write_text(record_line(record))


def test_hours_at_a_given_rate(tmp_path: Path) -> None:
    expected = full_length(tmp_path, 1.0, **{"budget.trials": 5})
    assert expected.num_trials == 5
    assert expected.over_searches(lambda s: s.reached[-1]) == Range(5, 5, 5)
    assert expected.over_searches(lambda s: s.samples) == Range(18_000, 18_000, 18_000)
    assert expected.over_searches(lambda s: s.duration).mean == pytest.approx(3 * 3600, abs=1)
    assert (expected.confirm_runs, expected.confirm_batches) == (8, 4)
    text = expected.describe()
    assert "confirm         at most 8 full trainings, 28,800 samples: the best 3 and the de" in text
    assert "CPU-hours       5 (5 to 5), and 8 to confirm" in text
    assert "hours           3 (3 to 3), and 4 to confirm" in text
    assert "evaluation is not counted" in text


def test_what_is_prepared_is_told_in_bytes(tmp_path: Path) -> None:
    text = full_length(tmp_path, 1.0).describe()
    assert "frozen" not in text
    assert "1,048,576 images to train on and 1,024 of the benchmark take 3 GiB, once" in text
    tiled = {"generation": "8k", "lm_vocab_size": 100, "max_img_size": 64, "vit_img_size": 16}
    changes: dict[str, Any] = {f"vlm.{key}": value for key, value in tiled.items()}
    text = full_length(tmp_path, 1.0, **changes).describe()
    assert "1,048,576 tiles to train on and 1,024 of the benchmark take 769 MiB, once" in text
    text = full_length(tmp_path, 1.0, cache_vision_features=True).describe()
    # 16 patches of 48 numbers, each of 4 bytes on CPU
    assert "once for all searches; the output of each frozen vision encoder takes 3 GiB" in text


def test_unknown_hours(tmp_path: Path) -> None:
    expected = full_length(tmp_path, None, **{"budget.trials": 5})
    assert expected.rate is None
    assert "unknown: give --samples-per-second" in expected.describe()


@pytest.mark.parametrize(
    ("budget", "num_trials", "by"),
    [
        ({"hours": 10.0}, 20, "what fits budget.hours=10"),
        ({"hours": 10.0, "trials": 8}, 8, "budget.trials"),
        ({"hours": 1.0, "trials": 8}, 2, "what fits budget.hours=1"),
        ({"patience": 3}, 100, "an example"),
    ],
)
def test_how_many_trials_there_will_be(
    tmp_path: Path, budget: dict[str, Any], num_trials: int, by: str
) -> None:
    given = {f"budget.{key}": value for key, value in {"trials": None, **budget}.items()}
    expected = full_length(tmp_path, 1.0, **given)
    assert expected.num_trials == num_trials
    assert by in expected.trials_by


def test_the_rate_of_an_earlier_search(tmp_path: Path) -> None:
    earlier_search(tmp_path / "results", [1.0, 2.0, 9.0], lr_mp=0.05, batch_size=16)
    expected = full_length(tmp_path, None, **{"budget.trials": 4})
    assert expected.rate is not None
    assert expected.rate.samples_per_second == 2.0
    assert expected.rate.hours(4 * 3600, 4) * 3600 == pytest.approx(4 * (1800 + 5))
    assert "CPU-hours       2.01 (2.01 to 2.01)" in expected.describe()
    assert str(tmp_path / "results" / "earlier") in expected.describe()


@pytest.mark.parametrize(
    "change", [{"vlm.lm_n_blocks": 1}, {"cpu_threads": 2}, {"resources.workers": 2}]
)
def test_another_model_or_machine_says_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    earlier_search(tmp_path / "results", [1.0], **change)
    assert past_rate(space_of(tmp_path / "spaces"), tmp_path / "results") == (None, [])


def test_a_folder_to_learn_from_is_asked_too(tmp_path: Path) -> None:
    earlier_search(tmp_path / "elsewhere", [7.0])
    space = space_of(tmp_path / "spaces", warm_start=[str(tmp_path / "elsewhere" / "earlier")])
    rate, _ = past_rate(space, tmp_path / "results")
    assert rate is not None and rate.samples_per_second == 7.0


@pytest.mark.parametrize(
    ("search", "trials", "num_trials", "line", "confirm_runs"),
    [
        (
            "{choice: [16, 32]}",
            20,
            2,
            "2 distinct, fewer than budget.trials=20: the search ends",
            8,
        ),
        ("{choice: [32]}", 3, 1, "1 distinct, fewer than budget.trials=3: the search ends", 0),
        ("{choice: [16, 32]}", 2, 2, "2 distinct\n", 8),
        ("{choice: [16, 32]}", None, 2, "2 distinct\n", 8),
        ("{int: [1, 3000]}", 9, 9, "3,000 distinct\n", 8),
        ("default, lr_mp: default", 9, 9, "without number, by the ranges of lr_mp\n", 8),
    ],
)
def test_the_distinct_configurations_are_counted(
    tmp_path: Path, search: str, trials: int | None, num_trials: int, line: str, confirm_runs: int
) -> None:
    path = tmp_path / "space.yaml"
    key = "seed" if "int" in search else "batch_size"
    base = "{seed: 1}" if "int" in search else "{batch_size: 32}"
    if "default" in search:
        base = "{batch_size: 64}"
    path.write_text(f"preset: digits\nbase: {base}\nsearch: {{{key}: {search}}}")
    budget = {"budget.trials": trials, "budget.hours": 1e6}
    space = load_space(path, CUDA_FREE | {"scheduler.name": "none"} | budget)
    plan = SearchPlan(space, (), 3600, DATA)
    expected = Forecast(plan, 2, None, tmp_path / "results")
    assert (expected.num_trials, expected.confirm_runs) == (num_trials, confirm_runs)
    assert f"configurations  {line}" in expected.describe()


def pausing(tmp_path: Path, **overrides: Any) -> Forecast:
    """Return the forecast of 60 trials that pause at 400 and 1,200 of 3,600 samples."""
    scheduler = {"scheduler.name": "asha", "scheduler.type": "pausing", "budget.trials": 60}
    space = space_of(tmp_path / "spaces", **scheduler, **overrides)
    plan = SearchPlan(space, (400, 1200), 3600, DATA)
    return Forecast(plan, 2, 1.0, tmp_path / "results")


def test_trials_that_pause(tmp_path: Path) -> None:
    expected = pausing(tmp_path)
    waiting = expected.over_searches(lambda s: s.most_paused)
    assert 10 < waiting.low <= waiting.high < 60
    assert expected.over_searches(lambda s: s.num_retrained) == Range(0, 0, 0)
    assert expected.disk.paused == math.ceil(waiting.high) * expected.disk.state
    text = expected.describe()
    assert f"paused          {waiting} trials at a time at most; the states" in text
    assert "are kept (what the disk has room for); 0 (0 to 0) times one goes on" in text
    assert f", of paused trials {gib(expected.disk.paused)}, models" in text


def test_trials_that_pause_and_lose_their_states(tmp_path: Path) -> None:
    kept, dropped = pausing(tmp_path), pausing(tmp_path, **{"scheduler.max_paused": 2})
    assert dropped.disk.paused == 2 * dropped.disk.state
    assert dropped.over_searches(lambda s: s.num_retrained).mean > 0
    full, samples = (
        [each.over_searches(count).mean for each in (kept, dropped)]
        for count in (lambda s: s.reached[-1], lambda s: s.samples)
    )
    assert full[1] == pytest.approx(full[0], rel=0.1) and samples[1] > samples[0]
    assert "the states of at most 2 are kept (scheduler.max_paused)" in dropped.describe()
    stopping = full_length(tmp_path, 1.0, **{"budget.trials": 5})
    assert "paused" not in stopping.describe()


def test_several_objectives_are_counted_as_one_is(tmp_path: Path) -> None:
    """What trials are ordered by does not change how many go on; only one is confirmed."""
    both: Any = [{"metric": "mmstar_accuracy"}, {"metric": "val_loss"}]
    forecasts = []
    for more in ({}, {"objective": both}):
        space = space_of(tmp_path / "spaces", **more)
        plan = SearchPlan(space, (400, 1200), 3600, DATA)
        forecasts.append(Forecast(plan, 2, None, tmp_path / "results"))
    assert [s.reached for s in forecasts[0].searches] == [s.reached for s in forecasts[1].searches]
    assert "the best 3 and the default one" in forecasts[0].describe()
    assert "the best and the default" in forecasts[1].describe()
