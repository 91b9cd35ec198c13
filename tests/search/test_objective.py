"""Which metrics a search may be after."""

from pathlib import Path

import pytest

from nanovlm.errors import UserError
from nanovlm.search.plan import plan_search
from nanovlm.search.space import SearchSpace, load_space


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


@pytest.mark.parametrize("metric", ["mmstar_num_items", "mmstar_standard_error", "seconds"])
def test_no_objectives(tmp_path: Path, metric: str) -> None:
    with pytest.raises(UserError, match=f"no report has {metric!r} as a score"):
        plan_search(space_for(tmp_path, metric, "max"))
