"""Damaged space files and odd overrides: each is read, or refused with a message that says where.

From the shipped spaces, by a generator with a fixed seed, so that all runs see the same ones.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.sources import load_config, parse_overrides
from nanovlm.config.space import load_space
from nanovlm.config.space_schema import SCHEMA_FILE
from nanovlm.errors import UserError
from nanovlm.samplers.configurations import distributions, encode

SPACES = sorted(SCHEMA_FILE.parent.glob("*.yaml"))
NUM_FILES = 300
NUM_OVERRIDES = 300

ODD = (
    "", "~", "null", "true", "yes", "0", "-1", "1", "1:30", "0x1F", "0o17", "010", "1_000", "1e3",
    "1e-400", "1e400", ".inf", "-.inf", ".nan", "9" * 18, "9" * 400, "-" + "9" * 5000,
    "0x" + "f" * 5000, "2026-01-01", "2026-11-26T10:00:00Z", "[]", "{}", "[[]]", "[1, a]",
    "{1: default}", "{null: 1}", "{[1]: 2}", "{? {a: b} : c}", "[" * 3000, "{a: " * 3000,
    "- " * 500, "&a [*a]", "&a 1", "*a", "[&a [1, 1], &b [*a, *a], [*b, *b]]", "<<: {a: 1}",
    "{<<: {lr_mp: default}}", "!!int x", "!!float x", "!!binary x", "!!python/name:os.system",
    "!!timestamp 1", "!!set {a}", "!x y", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"a', "'a",
    "|", ">", "%YAML 2.0", "---", "...", "\t", "\x00", "\u2028", "default", "{choice: [1, 1.0]}",
    "{choice: [.nan]}", "{choice: [true, 1]}", "{uniform: [0, 1], when: {lr_mp: [a]}}",
    "{uniform: [a, 1]}", "{uniform: [0, 1e308]}", "{int: [0, 9223372036854775807]}", "a" * 300,
    "{default: x}", "{when: {}}", "{default: 1, when: 3}", "digits", "nanovlm-222m",
    "search_spaces", "vlm", "search", "resources", "größe", "=", "@", "`", "{", "]", ",", ": ", "#",
)  # fmt: skip

KEYS = (
    "lr_mp", "batch_size", "vlm", "vlm.lm_dropout", "vlm.image_mean", "epochs",
    "train_dataset_name", "preset", "preset.x", "base", "base.epochs", "base.vlm.lm_dropout",
    "search", "search.lr_mp", "search.batch_size", "search.x", "objective", "objective.mode",
    "sampler", "sampler.seed", "scheduler", "scheduler.rungs", "budget", "budget.hours",
    "budget.trials", "confirm", "confirm.holdout", "study", "study.storage", "warm_start",
    "warm_start.x", "resources", "resources.workers", "resources.cpus_per_worker", "compile",
    ".", "a.b.c",
)  # fmt: skip

SCALAR = re.compile(r"[^\s{}\[\],:#]+")


def mutated(text: str, rng: random.Random) -> str:
    """Return the text with one to three kinds of damage."""
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        line, at = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
        values = list(SCALAR.finditer(text, text.rindex("preset:") if "preset:" in text else 0))
        kind = rng.randrange(8)
        if kind <= 2 and values:
            start, end = rng.choice(values).span()
            text = text[:start] + rng.choice(ODD) + text[end:]
        elif kind == 3:
            text = text[:at] + rng.choice(ODD) + text[at:]
        elif kind == 4:
            text = text[:at] + text[at + rng.randint(1, 20) :]
        elif kind == 5:
            text = "\n".join([*lines[:line], lines[line], *lines[line:]])
        elif kind == 6:
            text = "\n".join([*lines[:line], " " * rng.randint(1, 4) + lines[line], *lines[line:]])
        else:
            text = text[:at]
    return text


def is_refused(path: Path, overrides: dict[str, Any]) -> bool:
    """Load a space and use it as a search does; return whether it was refused."""
    try:
        space = load_space(path, overrides)
    except UserError as error:
        assert all(message.strip() for message in error.messages)
        return True
    space.config_for(space.default_values())
    encode(space.parameters, space.default_values())
    distributions(space.parameters)
    written = path.with_name("written.yaml")
    written.write_text(space.to_yaml(), encoding="utf-8")
    assert not load_space(written).differences(space), "it is written as it was read"
    return False


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
def test_damaged_space_files_are_read_or_refused(tmp_path: Path, space: Path) -> None:
    rng = random.Random(space.stem)
    path = tmp_path / "space.yaml"
    refused = 0
    for _ in range(NUM_FILES // len(SPACES)):
        path.write_text(mutated(space.read_text(encoding="utf-8"), rng), encoding="utf-8")
        refused += is_refused(path, {})
    assert 0.2 < refused * len(SPACES) / NUM_FILES < 0.95, "both kinds are there"


def test_odd_overrides_are_taken_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "space.yaml"
    path.write_text("preset: digits\nsearch: {lr_mp: default, batch_size: {choice: [16, 32]}}")
    refused = 0
    for _ in range(NUM_OVERRIDES):
        arguments = [f"{rng.choice(KEYS)}={rng.choice(ODD)}" for _ in range(rng.randint(1, 2))]
        try:
            overrides = parse_overrides(arguments)
        except UserError:
            refused += 1
            continue
        refused += is_refused(path, overrides)
        try:
            load_config(None, "digits", overrides)
        except UserError as error:
            assert all(error.messages)
    assert 0.5 < refused / NUM_OVERRIDES < 0.99, "both kinds are there"
