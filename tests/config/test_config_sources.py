"""Configuration: precedence, overrides, and what is said about mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovlm.config.schema import CAULDRON_NAMES, TrainConfig, VLMConfig
from nanovlm.config.sources import Layer, build_config, config_values, load_config, parse_overrides
from nanovlm.config.yaml_text import parse_yaml, read_mapping, write_yaml
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
    assert config.log_wandb
    assert not load_config(None, "digits", {}).log_wandb
    assert len(dataclasses.fields(VLMConfig)) == 30 + 3 + 2 + 3  # of v0.1, images, v0.2, 8k
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
    [
        ("1e-3", 0.001), ("2E5", 2e5), ("1.5e3", 1500.0), ("-1e-3", -0.001), ("12", 12),
        ("e3", "e3"), (".5", 0.5), ("1.", 1.0), ("+1", 1), ("010", 10), ("0o17", 15),
        ("0x1F", 31), ("true", True), ("FALSE", False), ("~", None), ("", None),
        ("1:30", "1:30"), ("1_000", "1_000"), ("yes", "yes"), ("off", "off"), ("y", "y"),
        ("2026-11-26", "2026-11-26"), ("0b1", "0b1"), ("<<", "<<"), ("=", "="), ("-", [None]),
        ("{on: 1, 'null': [&a 2, *a]}", {"on": 1, "null": [2, 2]}),
        ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_yaml_numbers(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{1: default}", "keys must be text, got 1"),
        ("{null: 1}", "keys must be text, got null"),
        ("{[a]: 1}", "keys must be text, got sequence"),
        ("{a: 1, b: 2, a: 3}", "key stands twice: a"),
        ("[.inf]", "must be a finite number, got .inf"),
        ("1e400", "must be a finite number, got 1e400"),
        ("9223372036854775808", "whole numbers go from -9223372036854775807 to 922"),
        ("-" + "9" * 5000, "got -99999999999999999999999999999... (5001 characters)"),
        ("[&a [1], *a]", "an alias (*) can stand for a single value only"),
        ("&a {b: *a}", "an alias (*) can stand for a single value only"),
        ("[" * 21 + "]" * 21, "must not be more than 20 mappings and lists inside each other"),
        ("[" * 100_000, "must not be more than 20 mappings and lists inside each other"),
        ("!!int x", "x is no int"),
        ("!!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system is not read"),
        (r'"\0"', r"text must not hold the character '\x00'"),
        (r'"\ud800"', r"text must not hold the character '\ud800'"),
        (r'"\UFFFFFFFF"', "is not YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, rule: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(f"# here\n{text}", "my.yaml")
    assert caught.value.messages[0].startswith(
        "my.yaml" if rule == "is not YAML" else "my.yaml, line 2: "
    )
    assert rule in str(caught.value)


TEXTS = ("1e-3", "1:30", "yes", "null", "", "0o17", "2026-11-26", " a", "größe", "a: b", "- a", "#")


@pytest.mark.parametrize("read", [lambda text: parse_yaml(text, "written"), yaml.safe_load])
def test_what_is_written_is_read_as_it_was(read: Any) -> None:
    content = {"texts": list(TEXTS), "1e3": {"numbers": [1e-5, 1, -2.5, 1e300], "on": [True, None]}}
    assert read(write_yaml(content)) == content


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
        ("lr_mp=.nan", "command line: lr_mp: must be a finite number, got .nan"),
        (
            "vlm.vit_n_heads=7",
            "command line: vit_n_heads must divide vit_hidden_dim, got 7 and 768",
        ),
        ("vlm.vit_cls_flag=true", "command line: vlm.vit_cls_flag: must be False, got True"),
        ("preset=digit", "preset: there is no 'digit'. Did you mean 'digits'?"),
        ("lr_mp=1:30", "command line: lr_mp: must be a valid number, got '1:30'"),
        ("compile=no", "command line: compile: must be a valid boolean, got 'no'"),
        ("vlm={1: 2}", "command line: vlm: keys must be text, got 1"),
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
        (b"vlm.lm_dropout: 0\nvlm: {1: 2}", "line 2: keys must be text, got 1"),
        (b"#" * (2**20 + 1), "is no configuration: it has more than 1,048,576 bytes"),
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


def test_a_key_that_stands_twice_in_two_ways_of_writing(tmp_path: Path) -> None:
    layer = Layer("my.yaml", {"vlm": {"lm_dropout": 0.1}, "vlm.lm_dropout": 0.2})
    with pytest.raises(UserError, match=r"my\.yaml: key stands twice: vlm\.lm_dropout"):
        build_config(layer)


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
