"""Configuration: precedence, overrides, and what is said about mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovlm.config import CAULDRON_NAMES, TrainConfig, VLMConfig
from nanovlm.config_files import (
    Layer,
    build_config,
    config_values,
    load_config,
    parse_overrides,
    parse_yaml,
    read_mapping,
)
from nanovlm.errors import UserError


def test_defaults_are_those_of_nanovlm() -> None:
    config = TrainConfig()
    assert (config.lr_mp, config.lr_backbones, config.batch_size, config.epochs) == (
        2e-3,
        1e-4,
        256,
        5,
    )
    assert len(CAULDRON_NAMES) == 45
    assert len(dataclasses.fields(VLMConfig)) == 30 + 3
    assert config.vlm.image_mean == config.vlm.image_std == (0.5, 0.5, 0.5)
    assert config.vlm.image_resampling == "bicubic"
    assert config.vlm.num_image_tokens == 49
    assert config.vlm.vit_mlp_dim == 3072


def test_derived_width_follows_the_hidden_width_unless_given() -> None:
    assert VLMConfig(vit_hidden_dim=48, vit_n_heads=4).vit_mlp_dim == 192
    assert VLMConfig(vit_hidden_dim=48, vit_n_heads=4, vit_inter_dim=100).vit_mlp_dim == 100


def test_precedence_is_defaults_preset_file_command_line(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("lr_mp: 0.1\nlr_backbones: 0.1\nepochs: 7\nvlm: {lm_dropout: 0.1}")
    file = tmp_path / "config.yaml"
    file.write_text(f"preset: {preset}\nlr_backbones: 0.2\nepochs: 8\nvlm.vit_dropout: 0.2")
    config = load_config(file, None, parse_overrides(["epochs=9"]))
    assert (config.batch_size, config.lr_mp, config.lr_backbones, config.epochs) == (
        256,
        0.1,
        0.2,
        9,
    )
    assert (config.vlm.lm_dropout, config.vlm.vit_dropout) == (0.1, 0.2)


def test_config_survives_the_way_through_yaml() -> None:
    config = TrainConfig(lr_mp=1.234e-5, vlm=VLMConfig(lm_dropout=0.25))
    assert build_config(Layer("file", config_values(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("2E5", 2e5), ("1.5e3", 1500.0), ("-1e-3", -0.001), ("12", 12), ("e3", "e3")],
)
def test_yaml_numbers(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lrmp=1", "command line: unknown key 'lrmp'. Did you mean 'lr_mp'?"),
        ("lm_dropout=0", "command line: unknown key 'lm_dropout'. Did you mean 'vlm.lm_dropout'?"),
        ("batch_size=64.0", "command line: batch_size: must be a valid integer, got 64.0"),
        ("batch_size=0", "command line: batch_size: must be greater than 0, got 0"),
        ("compile=1", "command line: compile: must be a valid boolean, got 1"),
        (
            "train_dataset_name=[a, b, a]",
            "command line: train_dataset_name: must name each once, but has several times a, "
            "got ['a', 'b', 'a']",
        ),
        ("lr_mp=fast", "command line: lr_mp: must be a valid number, got 'fast'"),
        ("lr_mp=.nan", "command line: lr_mp: must be a finite number, got nan"),
        (
            "vlm.vit_n_heads=7",
            "command line: vit_n_heads must divide vit_hidden_dim, got 7 and 768",
        ),
        ("vlm.vit_cls_flag=true", "command line: vlm.vit_cls_flag: must be False, got True"),
        ("preset=digit", "preset: there is no 'digit'. Did you mean 'digits'?"),
        ("lr_mp", "command line: 'lr_mp' is not of the form key=value"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, None, parse_overrides([argument]))
    assert caught.value.messages == (message,)


def test_all_mistakes_are_told_at_once_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr_pm: 1\nepochs: two\nvlm: {lm_n_kv_heads: 2}")
    with pytest.raises(UserError) as caught:
        load_config(file, None, {"val_ratio": 2.0})
    assert caught.value.messages == (
        f"{file}: unknown key 'lr_pm'. Did you mean 'lr_mp'?",
        f"{file}: lm_n_kv_heads must divide lm_n_heads, got 2 and 9",
        f"{file}: epochs: must be a valid integer, got 'two'",
        "command line: val_ratio: must be less than 1, got 2.0",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not YAML"),
        (b"- a", "must be a mapping (`key: value` lines), got a list"),
        (b"epochs: 1\nepochs: 2", "key stands twice: epochs"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_mapping(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: there is no such file"):
        read_mapping(Path("nowhere.yaml"))


def test_image_values_are_lists_in_files(tmp_path: Path) -> None:
    config = build_config(Layer("file", {"vlm": {"image_mean": [0, 0.5, 1], "image_std": [1] * 3}}))
    assert config.vlm.image_mean == (0.0, 0.5, 1.0)
    values = config_values(config)
    assert values["vlm"]["image_mean"] == [0.0, 0.5, 1.0]
    assert build_config(Layer("again", yaml.safe_load(yaml.safe_dump(values)))) == config


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"image_mean": [0.5]}, "vlm.image_mean: must have at least 3 items, got [0.5]"),
        ({"image_mean": ["a", 0, 0]}, "vlm.image_mean: must be a valid number, got 'a'"),
        ({"image_std": [1, 0, 1]}, "vlm.image_std: must be greater than 0, got 0"),
        ({"image_resampling": "area"}, "vlm.image_resampling: must be 'bilinear' or 'bicubic'"),
    ],
)
def test_image_values_that_cannot_be(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(Layer("file", {"vlm": values}))
    assert caught.value.messages[0].startswith(f"file: {rule}")


def test_the_holdout_cannot_be_asked_where_nothing_is_kept_apart() -> None:
    layer = Layer("command line", {"mmstar_part": "holdout"})
    with pytest.raises(UserError, match=r"command line: .*mmstar_holdout must be above 0, got 0"):
        build_config(layer)
    kept = Layer("preset", {"mmstar_holdout": 0.5})
    assert build_config(kept, layer).mmstar_part == "holdout"
    assert build_config(Layer("file", {"mmstar_part": "search"})).mmstar_holdout == 0
