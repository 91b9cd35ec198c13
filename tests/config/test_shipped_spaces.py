"""The spaces and presets that ship: they load, and their heads say what they cost."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.parameter import TUNABLE, Parameter
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.training.flops import model_flops, trained_parts

REPOSITORY = Path(__file__).parents[2]
SPACES = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))
LR, FULL, FINE = (
    load_space(REPOSITORY / "search_spaces" / f"{name}.yaml") for name in ("lr", "full", "fine")
)


def within(searched: Parameter) -> bool:
    """Return whether all values lie in the key's natural range."""
    natural = TUNABLE[searched.key]
    if natural.kind == "choice":
        return set(searched.values) <= set(natural.values)
    low, high = natural.values
    return all(low <= value <= high for value in searched.values)  # type: ignore[operator]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_space_says_how_to_run_it_and_what_it_costs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# python run_search.py --space search_spaces/{path.name}\n")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# Cost:") for line in head)
    assert any(line.startswith("# Expected") for line in head)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"search_spaces/{path.name}" in readme


@pytest.mark.parametrize("space", [LR, FULL, FINE], ids=lambda space: space.name)
def test_the_values_lie_in_the_natural_ranges(space: SearchSpace) -> None:
    assert [str(parameter) for parameter in space.parameters if not within(parameter)] == []


@pytest.mark.parametrize("space", [LR, FULL], ids=lambda space: space.name)
def test_trial_0_is_nanovlm(space: SearchSpace) -> None:
    expected = TrainConfig(data_cutoff_idx=100_000, epochs=1)
    assert space.base == space.config_for(space.default_values()) == expected


def test_trial_0_of_the_fine_space_is_the_published_recipe() -> None:
    preset = build_config(preset_layer("nanovlm-460m-8k"))
    expected = dataclasses.replace(preset, data_cutoff_idx=50_000, epochs=4)
    assert FINE.base == FINE.config_for(FINE.default_values()) == expected
    rates = ("lr_mp", "lr_vision_backbone", "lr_language_backbone")
    assert {parameter.key for parameter in FINE.parameters} == {*rates}
    assert [getattr(expected, rate) for rate in rates] == [5.12e-3, 5e-5, 5e-5]


def test_the_cost_of_the_fine_space_is_what_flops_say() -> None:
    text = (REPOSITORY / "search_spaces" / "fine.yaml").read_text(encoding="utf-8")
    head = " ".join(text.replace("\n#", "").split())
    vlm, small = FINE.base.vlm, TrainConfig()
    flops = model_flops(vlm, trained_parts(FINE.base))
    one, five, most = (flops.of_samples([200], 120, [tiles]) / 1e12 for tiles in (1, 5, 17))
    assert f"that is {five:.1f} TFLOP; with 1 tile it is {one:.1f}, with the" in head
    assert f"17 tiles of a scanned page {most:.1f}." in head
    assert f"{(flops.vision_encoder + flops.projector) / 1e12:.2f} TFLOP a tile" in head
    of_222m = model_flops(small.vlm, trained_parts(small)).of_samples([33], 9) / 1e12
    rate = 1768 * of_222m / five
    assert f"{198_656 / rate / 3600:.2f} for a full trial at {rate:.0f} samples/s" in head
    assert f"({1768 * of_222m:.0f} TFLOP/s" in head
    tile = 3 * vlm.vit_img_size**2
    assert f"{50_000 * 5 * tile / 1e9:.0f} GB of prepared tiles, {tile / 1e6:.2f} MB each" in head


def test_what_is_searched() -> None:
    lr_keys = {"lr_mp", "lr_backbones", "batch_size"}
    assert {parameter.key for parameter in LR.parameters} == lr_keys
    assert {parameter.key for parameter in FULL.parameters} == lr_keys | {
        "freeze",
        "lr_schedule",
        "max_grad_norm",
        "min_lr_ratio",
        "vlm.mp_pixel_shuffle_factor",
        "warmup_ratio",
        "weight_decay",
    }


@pytest.mark.parametrize(
    ("values", "inactive"),
    [
        ({"freeze": "none", "lr_schedule": "cosine", "batch_size": 64}, set()),
        ({"freeze": "vision_encoder", "lr_schedule": "linear", "batch_size": 128}, set()),
        ({"freeze": "backbones", "lr_schedule": "cosine", "batch_size": 64}, {"lr_backbones"}),
        ({"freeze": "none", "lr_schedule": "constant", "batch_size": 64}, {"min_lr_ratio"}),
        (
            {"freeze": "none", "lr_schedule": "linear", "batch_size": 256},
            {"vlm.mp_pixel_shuffle_factor"},
        ),
    ],
)
def test_the_conditions_of_the_full_space(values: dict[str, Any], inactive: set[str]) -> None:
    assert {p.key for p in FULL.parameters if not p.is_active(values)} == inactive


def test_every_preset_is_a_configuration() -> None:
    presets = sorted(
        path.stem for path in (REPOSITORY / "nanovlm" / "config" / "presets").glob("*.yaml")
    )
    configs = {preset: build_config(preset_layer(preset)) for preset in presets}
    assert configs["nanovlm-222m"] == TrainConfig()
