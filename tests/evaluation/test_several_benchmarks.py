"""Several benchmarks in one run: each as it is alone, and their weighted mean."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest

from nanovlm.config.schema import TrainConfig
from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.data.sources import pin_data
from nanovlm.errors import UserError
from nanovlm.evaluation.benchmarks import benchmark_configs
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.trial import metric_names, run_trial
from tests.tiny import digits_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks: the first 40 questions of the digits, and the last 60."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = digits_benchmark_rows()
    parts = {"First-40": range(40), "last": range(len(rows) - 60, len(rows))}
    for name, items in parts.items():
        (folder / name).mkdir()
        rows.select(items).to_parquet(folder / name / "val.parquet")
    return folder


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    more = (str(folder / "First-40"), str(folder / "last"))
    config = digits_config(batch_size=16, lr_mp=1e-2, lr_backbones=1e-2, data_cutoff_idx=200)
    return dataclasses.replace(config, more_benchmarks=more, **changes)


def metrics_of(config: TrainConfig, resources: Resources) -> dict[str, float]:
    job = Job(number=0, trial_id="0", config=config, milestones=(1120,), parameters={})
    return dict(list(run_trial(job, resources))[-1].metrics)


def test_each_is_asked_as_it_is_alone(folder: Path) -> None:
    """And the mean is weighted as configured."""
    resources = Resources("cpu")
    config = config_of(folder, benchmark_weights=(3.0, 2.0, 1.0))
    together = metrics_of(config, resources)
    alone = {}
    for path in ("builtin:digits", *config.more_benchmarks):
        other = dataclasses.replace(
            config, test_dataset_path=path, more_benchmarks=(), benchmark_weights=None
        )
        alone[path] = metrics_of(other, resources)
    first, second, third = alone.values()
    assert {name: together[name] for name in first} == first
    assert "mean_accuracy" not in first
    for name, own, number in (("first_40", second, 40), ("last", third, 60)):
        for metric in ("accuracy", "letter_accuracy", "letter_nll", "num_items"):
            assert together[f"{name}_{metric}"] == own[f"mmstar_{metric}"]
        assert together[f"{name}_num_items"] == number
    accuracies = [own["mmstar_accuracy"] for own in alone.values()]
    assert len(set(accuracies)) > 1
    expected = (3 * accuracies[0] + 2 * accuracies[1] + accuracies[2]) / 6
    assert together["mean_accuracy"] == pytest.approx(expected)
    assert set(metric_names(config, resources)) == set(together)


def test_without_weights_all_count_alike(folder: Path) -> None:
    metrics = metrics_of(config_of(folder), Resources("cpu"))
    names = ("mmstar_accuracy", "first_40_accuracy", "last_accuracy")
    assert metrics["mean_accuracy"] == pytest.approx(sum(metrics[name] for name in names) / 3)


def test_frozen_features_serve_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, freeze="vision_encoder")
    cached = dataclasses.replace(config, cache_vision_features=True)
    resources = Resources("cpu")
    assert metrics_of(cached, resources) == pytest.approx(metrics_of(config, resources), rel=1e-5)


@pytest.mark.parametrize(
    ("path", "name"),
    [("lmms-lab/ScienceQA-IMG@0123abc", "scienceqa_img"), ("/data/AI2D.mc/", "ai2d_mc")],
)
def test_a_benchmark_is_called_as_its_folder(path: str, name: str) -> None:
    configs = benchmark_configs(digits_config(more_benchmarks=(path,)))
    assert list(configs) == ["mmstar", name]
    assert configs[name].test_dataset_path == path


@pytest.mark.parametrize("paths", [("a/one", "b/One"), ("a/MMStar",), ("x/val",)])
def test_names_must_tell_metrics_apart(paths: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="more_benchmarks: each must have a name of its own"):
        benchmark_configs(digits_config(more_benchmarks=paths))


def test_a_weight_for_each(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmark_weights must have a weight for .* makes 3"):
        config_of(folder, benchmark_weights=(1.0, 2.0))


def test_what_is_wrong_with_one_names_its_setting(folder: Path, tmp_path: Path) -> None:
    config = digits_config(more_benchmarks=(str(tmp_path / "nowhere"),))
    with pytest.raises(UserError, match=r"more_benchmarks='.*nowhere'"):
        pin_data(config)
    rows = digits_benchmark_rows().select(range(4)).to_list()
    rows[2]["answer"] = "seven"
    datasets.Dataset.from_list(rows, digits_benchmark_rows().features).to_parquet(
        tmp_path / "val.parquet"
    )
    config = digits_config(more_benchmarks=(str(tmp_path),))
    with pytest.raises(UserError, match="more_benchmarks: answer must be one capital letter"):
        Resources("cpu").benchmarks(config)
