"""The space file: what it gives, and everything that is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.parameter import TUNABLE, Parameter
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError

SPACE = """
base: {lr_mp: 1e-3, epochs: 1}
search:
  lr_mp: {log_uniform: [1e-4, 1e-1]}
  batch_size: {choice: [64, 128, 256]}
  vlm.lm_dropout: {uniform: [0, 0.2], when: {batch_size: [64, 128]}}
  weight_decay: default
budget: {trials: 8}
"""


def read(tmp_path: Path, text: str, **overrides: Any) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return load_space(path, overrides)


def test_a_space_file(tmp_path: Path) -> None:
    space = read(tmp_path, SPACE)
    assert space.name == "space"
    assert space.parameters[0] == Parameter(
        key="lr_mp", kind="log_uniform", values=(1e-4, 1e-1), when={}
    )
    assert space.parameters[2].values == TUNABLE["weight_decay"].values
    assert space.default_values() == {"lr_mp": 1e-3, "batch_size": 256, "weight_decay": 0.01}
    assert space.batch_sizes() == (64, 256)
    config = space.config_for({"lr_mp": 0.05, "batch_size": 64, "vlm.lm_dropout": 0.1})
    assert (config.lr_mp, config.batch_size, config.vlm.lm_dropout) == (0.05, 64, 0.1)
    assert (config.epochs, config.weight_decay) == (1, 0.01)


def test_the_resolved_space_is_a_space_file_of_the_same_space(tmp_path: Path) -> None:
    space = read(tmp_path, SPACE)
    again = read(tmp_path, space.to_yaml())
    assert again == space


def test_a_condition_comes_after_the_key_that_it_asks_for(tmp_path: Path) -> None:
    text = """
search:
  vlm.lm_dropout: {uniform: [0, 0.2], when: {batch_size: 64}}
  batch_size: {choice: [64, 256]}
"""
    space = read(tmp_path, text)
    assert [parameter.key for parameter in space.parameters] == ["batch_size", "vlm.lm_dropout"]
    assert space.parameters[1].is_active({"batch_size": 64})
    assert not space.parameters[1].is_active({"batch_size": 256})
    assert space.default_values() == {"batch_size": 256}


def test_overrides_reach_the_sections_and_the_base(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"budget.trials": 3, "epochs": 2, "scheduler.rungs": 2}
    overrides |= {"search.lr_mp": {"log_uniform": [1e-3, 1e-2]}, "vlm.lm_dropout": 0.1}
    space = read(tmp_path, SPACE, **overrides)
    assert (space.budget.trials, space.base.epochs, space.scheduler.rungs) == (3, 2, 2)
    assert space.parameters[0].values == (1e-3, 1e-2)
    assert space.base.vlm.lm_dropout == 0.1


def test_an_override_of_the_base_wins_over_both_ways_of_writing_it(tmp_path: Path) -> None:
    text = "base: {vlm: {lm_dropout: 0.1}, vlm.vit_dropout: 0.1}\nsearch: {lr_mp: default}"
    overrides = {"base.vlm.lm_dropout": 0.2, "base.vlm.vit_dropout": 0.2, "base.epochs": 2}
    base = read(tmp_path, text, **overrides).base
    assert (base.vlm.lm_dropout, base.vlm.vit_dropout, base.epochs) == (0.2, 0.2, 2)


@pytest.mark.parametrize("key", ["preset.x", "warm_start.x", "objective.metric"])
def test_an_override_inside_of_what_is_no_mapping(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"command line: {key}: .* is not a mapping"):
        read(tmp_path, "search: {lr_mp: default}\nobjective: val_loss", **{key: 1})


def search(key: str, content: str) -> str:
    return f"search: {{{key}: {content}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (search("lr_pm", "default"), "search.lr_pm: this key cannot be searched. Did you mean"),
        (search("epochs", "{int: [1, 2]}"), "search.epochs: this key cannot be searched."),
        (search("lr_mp", "{log_uniform: [0, 1]}"), "low must be above 0 on a log scale"),
        (search("lr_mp", "{uniform: [2, 1]}"), "low must be below high, got [2, 1]"),
        (search("lr_mp", "{uniform: [1, 1]}"), "low must be below high, got [1, 1]"),
        (search("lr_mp", "{uniform: []}"), "must be two numbers [low, high], got []"),
        (search("lr_mp", "{uniform: [a, b]}"), "must be two numbers [low, high]"),
        (search("lr_mp", "{uniform: [-1, 1]}"), "must be greater than or equal to 0, got -1"),
        (search("lr_mp", "{uniform: 3}"), "uniform: must be a list, got 3"),
        (search("lr_mp", "{normal: [0, 1]}"), "must have one of uniform, log_uniform, int"),
        (search("lr_mp", "0.1"), "must be `default` or {kind: values}, got 0.1"),
        (search("batch_size", "{choice: []}"), "choice: must have at least one value"),
        (search("batch_size", "{choice: [64, a]}"), "must be of one type, got number and text"),
        (search("batch_size", "{choice: [64, true]}"), "must be of one type"),
        (search("batch_size", "{choice: [64, 64]}"), "values must differ, got [64, 64]"),
        (search("batch_size", "{choice: [[64]]}"), "must be numbers, texts, true, false or null"),
        (search("batch_size", "{choice: [64.5]}"), "must be a valid integer"),
        (search("batch_size", "{uniform: [32, 64]}"), "must have one of int, log_int, choice"),
        (search("seed", "{int: [0.5, 2]}"), "must be two whole numbers [low, high]"),
        (search("vlm.mp_pixel_shuffle_factor", "{choice: [2, 3]}"), "must divide"),
        (search("lr_mp", "{uniform: [0.5, 1]}"), "trial 0 runs the base configuration"),
        (search("lr_mp", "{uniform: [0, 1], when: {seed: 1}}"), "when.seed: is not a searched key"),
        (search("lr_mp", "{uniform: [0, .inf]}"), "space.yaml: must be a finite number, got .inf"),
        (search("lr_mp", "default, seed: {int: [0, 1], when: {lr_mp: [a]}}"), "must be values of"),
        (
            search("batch_size", "{choice: [1, 2]}, seed: {int: [0, 1], when: {batch_size: true}}"),
            "when.batch_size: must be values of choice [1, 2], got [True]",
        ),
        ("search: {1: default}", "space.yaml: keys must be text, got 1"),
        ("search: {}", "search: must have at least 1 item"),
        ("search: 3", "search: must be a valid dictionary, got 3"),
        ("base: {}", "search: must be given"),
        ("serach: {lr_mp: default}", "unknown key 'serach'. Did you mean 'search'?"),
        ("- lr_mp", "must be a mapping"),
        ("search: [", "is not YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "space.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("budget: {trails: 3}", "unknown key 'budget.trails'. Did you mean 'trials'?"),
        ("budget: {hours: 1:30}", "budget.hours: must be a valid number, got '1:30'"),
        ("scheduler: {rungs: 65}", "scheduler.rungs: must be less than or equal to 64, got 65"),
        ("budget: {trials: 0}", "budget.trials: must be greater than 0, got 0"),
        ("budget: {}", "budget: one of trials, hours, gpu_hours, target, patience must be given"),
        ("scheduler: {rungs: 0}", "scheduler.rungs: must be greater than or equal to 1, got 0"),
        (
            "scheduler: {name: bohb}",
            "scheduler.name: must be 'asha', 'hyperband', 'pasha' or 'none', got 'bohb'",
        ),
        (
            "sampler: {name: gd}",
            "sampler.name: must be 'auto', 'tpe', 'gp', 'cmaes', 'qmc' or 'random', got 'gd'",
        ),
        ("objective: {mode: best}", "objective.mode: must be 'max' or 'min', got 'best'"),
        ("resources: {workers: 300}", "resources.workers: must not exceed the smallest batch_size"),
        ("resources: {gpus_per_worker: -1}", "must be greater than or equal to 0, got -1"),
        ("preset: nano", "preset: there is no 'nano'."),
        ("base: {epoch: 1}", "base: unknown key 'epoch'. Did you mean 'epochs'?"),
    ],
)
def test_refused_sections(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, f"search: {{lr_mp: default}}\n{section}")
    assert message in str(caught.value)


def test_conditions_that_wait_for_each_other(tmp_path: Path) -> None:
    text = """
search:
  lr_mp: {uniform: [0, 1], when: {seed: 1}}
  seed: {choice: [0, 1], when: {lr_mp: 0.5}}
"""
    with pytest.raises(UserError, match="conditions wait for each other: lr_mp, seed"):
        read(tmp_path, text)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = """
base: {epoch: 1}
search: {lr_mp: {log_uniform: [0, 1]}, batch_size: {choice: []}}
budget: {trails: 3}
"""
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert len(caught.value.messages) == 4


def test_every_natural_range_is_legal(tmp_path: Path) -> None:
    # lr_backbones is of use to a backbone without a rate of its own alone.
    keys = "\n".join(f"  {key}: default" for key in TUNABLE if key != "lr_backbones")
    space = read(tmp_path, f"search:\n{keys}")
    common = read(tmp_path, search("lr_backbones", "default"))
    parameters = (*space.parameters, *common.parameters)
    assert {parameter.key for parameter in parameters} == set(TUNABLE)
    for parameter in parameters:
        assert dataclasses.asdict(parameter)["values"] == TUNABLE[parameter.key].values


RATES = "lr_vision_backbone: default, lr_language_backbone: default"


def test_trial_0_has_the_common_rate_for_one_that_is_null(tmp_path: Path) -> None:
    space = read(tmp_path, f"base: {{lr_backbones: 3e-5}}\nsearch: {{lr_mp: default, {RATES}}}")
    values = {"lr_mp": 2e-3, "lr_vision_backbone": 3e-5, "lr_language_backbone": 3e-5}
    assert space.default_values() == values
    first = space.config_for(values)
    assert first.peak_learning_rates == space.base.peak_learning_rates
    assert read(tmp_path, space.to_yaml()) == space
    own = read(tmp_path, f"base: {{lr_vision_backbone: 1e-5}}\nsearch: {{{RATES}}}")
    assert own.default_values() == {"lr_vision_backbone": 1e-5, "lr_language_backbone": 1e-4}
    null = read(tmp_path, search("lr_vision_backbone", "{choice: [null, 0, 1e-5]}"))
    assert null.default_values() == {"lr_vision_backbone": None}


@pytest.mark.parametrize(
    ("base", "searched", "refused"),
    [
        ("", f"lr_backbones: default, {RATES}", "lr_backbones"),
        ("lr_vision_backbone: 1e-5", "lr_language_backbone: default, lr_backbones: default",
         "lr_backbones"),
        ("", "lr_vision_backbone: default, lr_backbones: default", None),
        ("", "lr_backbones: default, lr_vision_backbone: {choice: [null, 1e-5]}, "
         "lr_language_backbone: default", None),
        ("", "lr_backbones: default, lr_language_backbone: default, freeze: default, "
         "lr_vision_backbone: {log_uniform: [1e-6, 1e-3], when: {freeze: none}}", None),
        ("freeze: vision_encoder", "lr_vision_backbone: default", "lr_vision_backbone"),
        ("freeze: vision_encoder", "lr_language_backbone: default", None),
        ("freeze: backbones", "lr_language_backbone: default", "lr_language_backbone"),
        ("freeze: backbones", "lr_backbones: default", None),
        ("freeze: backbones", "lr_language_backbone: default, freeze: default", None),
    ],
)  # fmt: skip
def test_a_searched_rate_that_no_trial_would_use(
    tmp_path: Path, base: str, searched: str, refused: str | None
) -> None:
    text = f"base: {{{base}}}\nsearch: {{{searched}}}"
    if refused is None:
        read(tmp_path, text)
        return
    with pytest.raises(UserError, match=rf"search\.{refused}: no trial would use it") as caught:
        read(tmp_path, text)
    assert len(caught.value.messages) == 1


def test_max_steps_and_a_searched_batch_size(tmp_path: Path) -> None:
    text = "base: {max_steps: 100}\nsearch: {batch_size: {choice: [64, 256]}}"
    with pytest.raises(UserError, match=r"max_steps: 100 steps are 6400 samples with batch_size=64 "
                       r"and 25600 with batch_size=256, while scheduler\.name=asha"):  # fmt: skip
        read(tmp_path, text)
    read(tmp_path, text, **{"scheduler.name": "none"})
    read(tmp_path, text, max_steps=None)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all", "true"])
def test_max_steps_that_cannot_be(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="base: max_steps: must be ") as caught:
        read(tmp_path, f"base: {{max_steps: {value}}}\nsearch: {{lr_mp: default}}")
    assert len(caught.value.messages) == 1


def test_a_resolved_space_of_before_there_were_later_keys_is_the_same(tmp_path: Path) -> None:
    later = ("lr_vision_backbone:", "lr_language_backbone:", "max_steps:")
    space = read(tmp_path, SPACE)
    lines = space.to_yaml().splitlines()
    kept = [line for line in lines if not line.strip().startswith(later)]
    assert len(kept) == len(lines) - len(later)
    assert read(tmp_path, "\n".join(kept)).differences(space) == []
