"""The JSON schema of space files, by which editors complete and check them while they are written.

It is made from the code: the sections, the configuration's fields and their natural ranges. What
it cannot say (a lower end below the upper one, rules between several keys) `--dry-run` checks.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from nanovlm.config.parameter import KINDS, TUNABLE
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
    """Return the JSON schema of a space file."""
    schema = SpaceFile.model_json_schema(schema_generator=_Untitled)
    train = TypeAdapter(TrainConfig).json_schema(schema_generator=_Untitled)
    vlm = train["$defs"]["VLMConfig"]
    nested = {**train["properties"]["vlm"], "description": "Keys of the model, without `vlm.`."}
    dotted = {
        f"vlm.{key}": {"$ref": f"#/$defs/VLMConfig/properties/{key}"} for key in vlm["properties"]
    }
    fields = {
        **train["properties"],
        **{f"vlm.{key}": rule for key, rule in vlm["properties"].items()},
    }
    schema["$defs"] |= {"VLMConfig": vlm, "when": _conditions(fields)}
    sections = schema["properties"]
    sections["preset"] |= _preset()
    sections["base"] = {
        "type": "object",
        "description": "What all trials share; of a searched key, where trial 0 stands.",
        "properties": {**train["properties"], "vlm": nested, **dotted},
        "additionalProperties": False,
    }
    sections["search"] = {
        "type": "object",
        "description": "The searched keys. A key's natural range is `default`.",
        "minProperties": 1,
        "properties": {key: _parameter(key, fields[key]) for key in TUNABLE},
        "additionalProperties": False,
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


def _parameter(key: str, field: Schema) -> Schema:
    """Return the schema of what stands at a searched key."""
    natural, values = TUNABLE[key], _rule(field)
    kinds: Schema = {kind: _values(kind, values) for kind in KINDS if _fits(kind, values)}
    kinds["default"] = {"description": "The natural range."}
    about = f"Natural range: {natural.kind} {json.dumps(natural.values)}."
    return {
        "description": f"{field.get('description', '')} {about}".strip(),
        "anyOf": [
            {"const": "default"},
            {
                "type": "object",
                "properties": {**kinds, "when": {"$ref": "#/$defs/when"}},
                "additionalProperties": False,
                "oneOf": [{"required": [kind]} for kind in kinds],
            },
        ],
    }


def _fits(kind: str, values: Schema) -> bool:
    """Return whether a key of such values can be searched that way."""
    types = {rule.get("type") for rule in (values, *values.get("anyOf", ()))}
    needed = {"int": {"integer", "number"}, "log_int": {"integer", "number"}, "choice": types}
    return bool(types & needed.get(kind, {"number"}))


def _values(kind: str, values: Schema) -> Schema:
    if kind == "choice":
        return {"type": "array", "items": values, "minItems": 1, "uniqueItems": True}
    number: Schema = {"type": "integer" if kind.endswith("int") else "number"}
    if kind.startswith("log_"):
        number["exclusiveMinimum"] = 0
    return {
        "type": "array",
        "description": "[low, high], both ends included.",
        "items": {"allOf": [number, values]},
        "minItems": 2,
        "maxItems": 2,
    }


def _conditions(fields: Mapping[str, Schema]) -> Schema:
    rules = {key: _rule(fields[key]) for key in TUNABLE}
    return {
        "type": "object",
        "description": "Part of a trial only if each of these searched keys has such a value.",
        "properties": {
            key: {"anyOf": [rule, {"type": "array", "items": rule, "minItems": 1}]}
            for key, rule in rules.items()
        },
        "additionalProperties": False,
    }


def _rule(field: Schema) -> Schema:
    """Return what a value has to be, without what it is for."""
    return {name: part for name, part in field.items() if name not in ("default", "description")}
