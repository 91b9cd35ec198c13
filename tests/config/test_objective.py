"""Which metrics a search may be after."""

from pathlib import Path

import pytest

from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.search.plan import plan_search


def space_for(folder: Path, metric: str, mode: str) -> SearchSpace:
    (folder / "space.yaml").write_text("preset: digits\nsearch: {lr_mp: default}")
    settings = {"data_cutoff_idx": 100, "objective.metric": metric, "objective.mode": mode}
    return load_space(folder / "space.yaml", settings)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("mmstar_accuracy", "max"),
        ("mmstar_accuracy/math", "max"),
        ("mmstar_letter_accuracy", "max"),
        ("mmstar_letter_nll", "min"),
        ("val_loss", "min"),
    ],
)
def test_objectives(tmp_path: Path, metric: str, mode: str) -> None:
    plan_search(space_for(tmp_path, metric, mode))
    other = {"max": "min", "min": "max"}[mode]
    with pytest.raises(UserError, match=f"objective.mode: must be {mode!r} for {metric}"):
        plan_search(space_for(tmp_path, metric, other))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("[{metric: seconds_per_sample, mode: max}]",
         r"objective\[1\].mode: must be 'min' for seconds_per_sample, got 'max'"),
        ("[{metric: val_los}]",
         r"objective\[1\].metric: no report has 'val_los' as a score. Did you mean 'val_loss'"),
        ("[{metric: val_loss}, {metric: gflops}]",
         r"objective\[2\].metric: no report has 'gflops' as a score. .*gflops_per_sample"),
    ],
)  # fmt: skip
def test_several_objectives_that_cannot_be(tmp_path: Path, others: str, message: str) -> None:
    objectives = f"[{{metric: mmstar_accuracy}}, {others[1:]}"
    (tmp_path / "space.yaml").write_text(
        f"preset: digits\nsearch: {{lr_mp: default}}\nobjective: {objectives}"
    )
    with pytest.raises(UserError, match=message):
        plan_search(load_space(tmp_path / "space.yaml", {"data_cutoff_idx": 100}))


def test_several_objectives(tmp_path: Path) -> None:
    objectives = "[{metric: mmstar_accuracy}, {metric: val_loss}, {metric: gflops_per_sample}]"
    (tmp_path / "space.yaml").write_text(
        f"preset: digits\nsearch: {{lr_mp: default}}\nobjective: {objectives}"
    )
    plan = plan_search(load_space(tmp_path / "space.yaml", {"data_cutoff_idx": 100}))
    assert [each.mode for each in plan.space.objective.all] == ["max", "min", "min"]


@pytest.mark.parametrize("metric", ["mmstar_num_items", "mmstar_standard_error", "seconds"])
def test_no_objectives(tmp_path: Path, metric: str) -> None:
    with pytest.raises(UserError, match=f"no report has {metric!r} as a score"):
        plan_search(space_for(tmp_path, metric, "max"))
