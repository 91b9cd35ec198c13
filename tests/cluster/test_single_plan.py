"""What a single run finds out before it starts: as much as a search."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from nanovlm.cluster.single_run import check_same_config, plan_single, run_single, trial_resources
from nanovlm.config.sources import config_values
from nanovlm.config.space import load_space
from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.errors import UserError
from nanovlm.search.plan import plan_search
from tests.tiny import digits_config


def write_benchmark(folder: Path, category: str | None) -> str:
    """Write a benchmark of three questions; return its folder."""
    rows = digits_benchmark_rows().select(range(3))
    folder.mkdir()
    rows = rows.remove_columns("category").add_column("category", ["a", category, "c"])
    rows.to_parquet(folder / "b.parquet")
    return str(folder)


def test_a_null_category_is_said_in_the_plan_of_a_run_and_of_a_search(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "b", None)
    with pytest.raises(UserError, match=r"b/b\.parquet row 1: category is null"):
        plan_single(digits_config(batch_size=16, test_dataset_path=path))
    base = f"{{data_cutoff_idx: 40, batch_size: 16, test_dataset_path: {path}}}"
    space = f"preset: digits\nbase: {base}\nsearch: {{lr_mp: default}}\n"
    (tmp_path / "s.yaml").write_text(space)
    with pytest.raises(UserError, match=r"b/b\.parquet row 1: category is null"):
        plan_search(load_space(tmp_path / "s.yaml"))


def test_a_single_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    plan = plan_single(
        digits_config(batch_size=16, test_dataset_path=write_benchmark(tmp_path / "b", "a"))
    )
    before = {
        part: {"folder": f"/anywhere/{made['folder'][-16:]}"} for part, made in plan.data.items()
    }
    results = tmp_path / "results"
    results.mkdir()
    (results / "config.yaml").write_text(yaml.safe_dump(config_values(plan.config)))
    (results / "data.json").write_text(json.dumps(before | {"training": {"folder": "/another"}}))
    with pytest.raises(UserError, match=r"the data for training is not that of .*data\.json"):
        run_single(plan, results, trial_resources(plan.config, 1), resume=True)


def test_max_steps_counts_in_the_plan_of_a_run_and_of_a_search(tmp_path: Path) -> None:
    config = digits_config(batch_size=16, epochs=3)
    by_epochs = plan_single(config)
    per_epoch = by_epochs.milestones[0]
    assert by_epochs.milestones == (per_epoch, 2 * per_epoch)
    steps = per_epoch // 16 + 2
    cut = plan_single(dataclasses.replace(config, max_steps=steps, eval_interval=steps - 1))
    assert cut.trial_samples == 16 * steps
    assert cut.milestones == (per_epoch, 16 * (steps - 1))
    longer = plan_single(dataclasses.replace(config, max_steps=10**6))
    assert longer[1:] == by_epochs[1:], "the epochs end first"
    text = "preset: digits\nbase: {data_cutoff_idx: 40, batch_size: 16}\nsearch: {lr_mp: default}\n"
    (tmp_path / "s.yaml").write_text(text)
    plan = plan_search(load_space(tmp_path / "s.yaml", {"max_steps": 9, "scheduler.rungs": 3}))
    assert (plan.trial_samples, plan.milestones) == (9 * 16, (16, 48))
    assert plan.describe() == "s: trials of 144 samples (max_steps=9), compared at 16, 48"
    unlimited, limited = (
        plan_search(load_space(tmp_path / "s.yaml", {"max_steps": limit}))
        for limit in (None, 10**6)
    )
    assert limited.milestones == unlimited.milestones
    assert limited.describe() == unlimited.describe()


def test_a_run_of_before_there_were_later_keys_goes_on_if_they_are_null(tmp_path: Path) -> None:
    config = digits_config()
    values = config_values(config)
    for key in ("lr_vision_backbone", "lr_language_backbone", "max_steps", "relevance_min_rating"):
        del values[key]
    del values["vlm"]["generation"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    check_same_config(tmp_path, config)
    with pytest.raises(UserError, match=r"config\.yaml differs in lr_vision_backbone, max_steps$"):
        check_same_config(
            tmp_path, dataclasses.replace(config, lr_vision_backbone=0.0, max_steps=1)
        )
