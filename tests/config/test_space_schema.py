"""The JSON schema of space files: current, and of one mind with the program."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from nanovlm.__main__ import main
from nanovlm.config.parameter import TUNABLE
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import SECTIONS
from nanovlm.config.sources import CONFIG_KEYS, config_values
from nanovlm.config.space import load_space
from nanovlm.config.space_schema import SCHEMA_FILE, schema_text, space_schema
from nanovlm.config.yaml_text import parse_yaml
from nanovlm.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SPACES = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
VALIDATOR = Draft202012Validator(space_schema())


def complaints(content: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(content)]


def shown_spaces() -> list[Any]:
    """Return every YAML block of the documents that is a space file or a part of one."""
    blocks = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)):
            content = parse_yaml(block, document.name)
            if isinstance(content, dict) and content.keys() <= set(SECTIONS):
                blocks.append(pytest.param(content, id=f"{document.name}-{number}"))
    return blocks


def test_the_file_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "python -m nanovlm schema --write"
    )
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == space_schema()


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(space_schema())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_the_spaces_that_ship_are_valid_and_name_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert complaints(parse_yaml(text, path.name)) == []
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.MULTILINE)
    assert (path.parent / named).resolve() == SCHEMA_FILE
    resolved = parse_yaml(load_space(path).to_yaml(), path.name)
    assert complaints(resolved) == []


@pytest.mark.parametrize("content", shown_spaces())
def test_the_spaces_in_the_documents_are_valid(content: dict[str, Any]) -> None:
    assert complaints({"search": {"lr_mp": "default"}, **content}) == []


def test_every_key_and_section_is_known() -> None:
    properties = space_schema()["properties"]
    assert set(properties) == set(SECTIONS)
    assert set(properties["base"]["properties"]) == {*CONFIG_KEYS, "vlm"}
    assert set(properties["search"]["properties"]) == set(TUNABLE)


RIGHT = [
    "search: {lr_mp: default}",
    "search: {lr_mp: {default: , when: {freeze: none}}, freeze: default}",
    "search: {max_grad_norm: {choice: [null, 1, 10.5]}}",
    "search: {max_grad_norm: {log_int: [1, 10]}}",
    "search: {seed: {int: [0, 3]}, batch_size: {log_int: [8, 64]}}\nbase: {batch_size: 64}",
    "search: {lr_schedule: {choice: [cosine, constant]}}",
    "search: {vlm.lm_dropout: {uniform: [0, 0.2], when: {batch_size: [64]}}, batch_size: default}",
    "search: {seed: default}\nbase: {vlm: {lm_dropout: 0.1}, vlm.vit_dropout: 0.2, lr_mp: 1}",
    "search: {seed: default}\nbase: {micro_batch_size: auto, data_cutoff_idx: null}",
    "search: {seed: default}\npreset: digits\nbudget: {hours: 0.5, target: 0.9}",
    "search: {seed: default}\nobjective: {metric: val_loss}",
    "search: {seed: default}\nobjective: [{metric: a, mode: max}, {metric: val_loss, at_most: 2}]",
    "search: {seed: default}\nwarm_start: [results/a]\nstudy: {storage: 'mysql://a@b/c'}",
]

WRONG = [
    "search: {seed: default}\nobjective: []",
    "search: {seed: default}\nobjective: [{metric: a}, {metric: b}, {metric: c}, {metric: d}]",
    "search: {seed: default}\nobjective: [{metric: a}, {metric: b, at_most: low}]",
    "search: {seed: default}\nobjective: [{metric: a}, b]",
    "base: {epochs: 1}",
    "search: {}",
    "search: {learning_rate: default}",
    "search: {epochs: {int: [1, 3]}}",
    "search: {vlm: {lm_dropout: default}}",
    "search: {lr_mp: natural}",
    "search: {lr_mp: {log_uniform: [0, 0.1]}}",
    "search: {lr_mp: {log_uniform: [0.1]}}",
    "search: {lr_mp: {uniform: [0.1, fast]}}",
    "search: {lr_mp: {normal: [0.1, 0.2]}}",
    "search: {lr_mp: {uniform: [0.1, 0.2], log_uniform: [0.1, 0.2]}}",
    "search: {lr_mp: {when: {seed: 1}}, seed: default}",
    "search: {lr_mp: {uniform: [0.1, 0.2], when: {epochs: 1}}}",
    "search: {batch_size: {uniform: [16, 64]}}",
    "search: {batch_size: {choice: [0, 64]}}",
    "search: {batch_size: {choice: []}}",
    "search: {batch_size: {choice: [64, 64]}}",
    "search: {batch_size: {int: [1.5, 64]}}",
    "search: {max_grad_norm: {uniform: [null, 1]}}",
    "search: {freeze: {choice: [all]}}",
    "search: {warmup_ratio: {uniform: [0.0, 1.5]}}",
    "search: {seed: default}\nbase: {epoch: 1}",
    "search: {seed: default}\nbase: {epochs: '1'}",
    "search: {seed: default}\nbase: {vlm: {dropout: 0.1}}",
    "search: {seed: default}\nbase: {vlm.lm_dropout: 1}",
    "search: {seed: default}\nbase: {lm_dropout: 0.1}",
    "search: {seed: default}\npreset: digit",
    "search: {seed: default}\nobjective: {mode: maximize}",
    "search: {seed: default}\nsampler: {name: bohb}",
    "search: {seed: default}\nscheduler: {rungs: 0}",
    "search: {seed: default}\nbudget: {trials: 0}",
    "search: {seed: default}\nbudget: {hour: 1}",
    "search: {seed: default}\nresources: {workers: 1.5}",
    "search: {seed: default}\nwarm_start: results/a",
    "search: {seed: default}\nsecretary: {}",
]


def is_accepted(text: str, folder: Path) -> bool:
    (folder / "space.yaml").write_text(text)
    try:
        load_space(folder / "space.yaml")
    except UserError:
        return False
    return True


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_program_takes_is_valid(text: str, tmp_path: Path) -> None:
    assert is_accepted(text, tmp_path)
    assert complaints(parse_yaml(text, "space")) == []


@pytest.mark.parametrize("text", WRONG)
def test_what_the_program_refuses_is_not(text: str, tmp_path: Path) -> None:
    assert not is_accepted(text, tmp_path)
    assert complaints(parse_yaml(text, "space")) != []


def test_what_a_key_is_for_is_shown_with_its_range_and_default() -> None:
    sections = space_schema()["properties"]
    about = sections["search"]["properties"]["lr_mp"]["description"]
    assert about.startswith("Peak learning rate of the modality projector; 0 freezes it.")
    assert about.endswith("Natural range: log_uniform [1e-05, 0.1].")
    base = sections["base"]["properties"]
    values = config_values(TrainConfig())
    defaults = {key: base[key]["default"] for key in values if key != "vlm"}
    assert defaults == {key: value for key, value in values.items() if key != "vlm"}
