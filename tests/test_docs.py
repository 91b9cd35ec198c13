"""The documents name what the code has, with the same values."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.parameter import TUNABLE
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.search_settings import (
    Budget,
    Confirm,
    Objective,
    Sampler,
    Scheduler,
    Study,
    TrialResources,
)
from nanovlm.config.space import load_space
from nanovlm.messages import End, Speed, TrialRecord
from nanovlm.records import FIELDS

REPOSITORY = Path(__file__).parents[1]
CONFIG_DOC = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(.+?)` \| `(.*?)` \| (.*?) \|", re.MULTILINE)
ROWS = {key: cells for key, *cells in ROW.findall(CONFIG_DOC)}
"""Of each table row that starts with a key: the default and the cell after it."""
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


def shown(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return f"{len(value)} names"
    return value if isinstance(value, str) else json.dumps(value)


def natural_range(key: str) -> str:
    if key not in TUNABLE:
        return ""
    return f"`{TUNABLE[key].kind} [{', '.join(map(shown, TUNABLE[key].values))}]`"


def test_every_config_key_stands_with_its_default_and_range() -> None:
    expected = {
        prefix + field.name: [shown(field.default), natural_range(prefix + field.name)]
        for prefix, owner in (("", TrainConfig), ("vlm.", VLMConfig))
        for field in dataclasses.fields(owner)
        if field.name != "vlm"
    }
    assert {key: cells for key, cells in ROWS.items() if key in expected} == expected


def test_every_setting_of_a_space_file_stands_with_its_default() -> None:
    expected = {
        f"{section.__name__.removeprefix('Trial').lower()}.{name}": shown(field.default)
        for section in (Objective, Sampler, Scheduler, Budget, Confirm, Study, TrialResources)
        for name, field in section.model_fields.items()
    }
    assert {key: cells[0] for key, cells in ROWS.items() if key in expected} == expected


@pytest.mark.parametrize("document", ["README.md", "docs/config.md"])
def test_the_space_files_shown_can_be_used(document: str, tmp_path: Path) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "search:" in b]
    assert blocks
    for block in blocks:
        (tmp_path / "space.yaml").write_text(block)
        load_space(tmp_path / "space.yaml")


def test_every_field_of_a_trial_record_stands_in_order() -> None:
    text = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    assert section.startswith("`trials.jsonl`")
    fields = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert fields == list(FIELDS)
    assert {field.name for field in dataclasses.fields(TrialRecord)} <= set(FIELDS)
    (ends,) = re.findall(r"^\| `end` \| (.*) \|$", section, re.MULTILINE)
    assert re.findall(r"`(\w+)`: ", ends) == [*End]


def test_every_field_of_a_speed_stands_in_order() -> None:
    text = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    (section,) = (part for part in text.split("\n## ") if part.startswith("Speed\n"))
    fields = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert fields == [field.name for field in dataclasses.fields(Speed)]


def test_the_architecture_names_every_folder() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    (table,) = (part for part in text.split("\n## ") if part.startswith("Where things are\n"))
    folders = {path.parent for path in (REPOSITORY / "nanovlm").rglob("*.py")}
    assert [str(path) for path in folders if f"{path.name}/" not in table] == []
    named = re.findall(r"`((?:nanovlm/)?[\w/]+(?:/|\.py))`", table)
    assert all(
        (REPOSITORY / name).exists()
        or (REPOSITORY / "nanovlm" / name).exists()
        or (REPOSITORY / "nanovlm/watch" / name).exists()
        for name in named
    )


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in heading_anchors(file.read_text(encoding="utf-8")), target
