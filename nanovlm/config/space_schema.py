"""The JSON schema of space files, by which editors complete and check them.

pydantic derives it from the sections, the configurations and the searched keys. `--dry-run` also
checks what a schema cannot express, such as rules between several keys.
"""

import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from nanovlm.config.parameter import search_model
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import SpaceFile
from nanovlm.config.sources import PRESETS_DIR, SPACES_DIR

SCHEMA_FILE = SPACES_DIR / "space.schema.json"

Schema = dict[str, Any]


class _Untitled(GenerateJsonSchema):
    """Leaves out titles, which only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text() -> str:
    """Return the content of `search_spaces/space.schema.json`."""
    return json.dumps(space_schema(), indent=2) + "\n"


def space_schema() -> Schema:
    schema = SpaceFile.model_json_schema(schema_generator=_Untitled)
    train = TypeAdapter(TrainConfig).json_schema(schema_generator=_Untitled)
    vlm = train["$defs"]["VLMConfig"]
    nested = {**train["properties"]["vlm"], "description": "Keys of the model, without `vlm.`."}
    dotted = {
        f"vlm.{key}": {"$ref": f"#/$defs/VLMConfig/properties/{key}"} for key in vlm["properties"]
    }
    search = search_model().model_json_schema(schema_generator=_Untitled)
    schema["$defs"] |= {"VLMConfig": vlm, **search.pop("$defs")}
    sections = schema["properties"]
    sections["preset"] |= _preset()
    sections["base"] = {
        "type": "object",
        "description": "What all trials share; of a searched key, where trial 0 stands.",
        "properties": {**train["properties"], "vlm": nested, **dotted},
        "additionalProperties": False,
    }
    sections["search"] = search | {
        "description": "The searched keys. A key's natural range is `default`.",
        "minProperties": 1,
    }
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Space file of run_search.py",
    }
    return {**head, **{key: value for key, value in schema.items() if key != "title"}}


def _preset() -> Schema:
    names = sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
    return {
        "description": "What everything starts from: a name, such as digits, or a YAML file.",
        "anyOf": [{"enum": names}, {"pattern": r"\.ya?ml$"}],
    }
