"""The searched keys of a space: kinds, values and conditions, read and checked by pydantic."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from nanovlm.config.fields import STRICT, Scalar, Tunable
from nanovlm.config.schema import STAND_INS, TrainConfig, VLMConfig
from nanovlm.errors import UserError, did_you_mean

Kind = Literal["uniform", "log_uniform", "int", "log_int", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_OWNERS: tuple[tuple[str, Any], ...] = (("", TrainConfig), ("vlm.", VLMConfig))
TUNABLE: dict[str, Tunable] = {
    prefix + field.name: field.metadata["tunable"]
    for prefix, owner in _OWNERS
    for field in dataclasses.fields(owner)
    if "tunable" in field.metadata
}
"""The keys that can be searched, with their natural ranges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A searched key."""

    key: str
    kind: Kind
    values: tuple[Scalar, ...]
    """`(low, high)`, both included, or the choices."""
    when: Mapping[str, tuple[Scalar, ...]]
    """Active only if each of these searched keys has one of the given values."""

    def __str__(self) -> str:
        return f"{self.kind} {list(self.values)}"

    def contains(self, value: Any) -> bool:
        if self.kind == "choice":  # for Python `True == 1`
            return any(value == one and _type_name(value) == _type_name(one) for one in self.values)
        low, high = self.values
        return _type_name(value) == "number" and low <= value <= high

    @property
    def num_values(self) -> int | None:
        """How many different values there are; None for a continuous range."""
        if self.kind == "choice":
            return len(self.values)
        low, high = self.values
        if isinstance(low, int) and isinstance(high, int):
            return high - low + 1
        return None

    @property
    def is_ordered(self) -> bool:
        """Whether the choices are numbers, which have an order that a sampler can use."""
        return self.kind == "choice" and all(_type_name(v) == "number" for v in self.values)

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Return whether the condition holds for the values of the parameters before this one."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())

    def to_yaml(self) -> dict[str, Any]:
        """Return what the space file says of this key."""
        content: dict[str, Any] = {self.kind: list(self.values)}
        if self.when:
            content["when"] = {key: list(values) for key, values in self.when.items()}
        return content


def given_or_stand_in(parameter: Parameter, values: Mapping[str, Any]) -> Any:
    """Return what a configuration has for a searched key; for null, which the search never has, the
    value that it stands for.

    Args:
        values: of the configuration, by key.
    """
    value = values[parameter.key]
    is_outside = value is None and parameter.key in STAND_INS and not parameter.contains(None)
    return values.get(STAND_INS[parameter.key]) if is_outside else value


def check_conditions(source: str, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Return the parameters ordered so that each comes after those its condition names.

    Raises:
        UserError: for a condition on a key that is not searched, on a value that it never has, or
            for conditions that wait for each other.
    """
    by_key = {parameter.key: parameter for parameter in parameters}
    messages = []
    for parameter in parameters:
        for other, values in parameter.when.items():
            where = f"{source}: search.{parameter.key}: when.{other}"
            if other not in by_key:
                messages.append(f"{where}: is not a searched key.{did_you_mean(other, by_key)}")
                continue
            never = [value for value in values if not by_key[other].contains(value)]
            if never or not values:
                messages.append(f"{where}: must be values of {by_key[other]}, got {list(values)}")
    if messages:
        raise UserError(*messages)
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parameters):
        ready = [
            p for p in parameters if p.key not in ordered and all(o in ordered for o in p.when)
        ]
        if not ready:
            waiting = ", ".join(p.key for p in parameters if p.key not in ordered)
            raise UserError(f"{source}: search: conditions wait for each other: {waiting}")
        ordered |= {parameter.key: parameter for parameter in ready}
    return tuple(ordered.values())


def count_configurations(parameters: Sequence[Parameter]) -> int | None:
    """Return how many different configurations there are; None if a key is continuous.

    Args:
        parameters: in an order in which a condition's key comes before what depends on it.
    """
    asked: dict[str, set[Any]] = {}
    for parameter in parameters:
        for key, values in parameter.when.items():
            asked.setdefault(key, set()).update(values)
    counts = Counter[frozenset[tuple[str, Any]]]({frozenset(): 1})
    for parameter in parameters:
        following = Counter[frozenset[tuple[str, Any]]]()
        named = asked.get(parameter.key, set())  # the others make no difference to what follows
        for state, number in counts.items():
            if not parameter.is_active(dict(state)):
                following[state] += number
                continue
            if parameter.num_values is None:
                return None
            for value in named:
                following[state | {(parameter.key, value)}] += number
            following[state] += number * (parameter.num_values - len(named))
        counts = +following
    return counts.total()


def _check_range(kind: Kind, values: Any) -> Any:
    whole = kind.endswith("int")
    allowed = (int,) if whole else (int, float)
    if not isinstance(values, list):
        raise ValueError("must be a list")
    if len(values) != 2 or not all(type(value) in allowed for value in values):
        raise ValueError(f"must be two {'whole ' * whole}numbers [low, high]")
    low, high = values
    if not low < high:
        raise ValueError("low must be below high")
    if kind.startswith("log_") and low <= 0:
        raise ValueError("low must be above 0 on a log scale")
    return values


def _check_choices(values: Any) -> Any:
    if not isinstance(values, list):
        raise ValueError("must be a list")
    if not values:
        raise ValueError("must have at least one value")
    if not all(value is None or isinstance(value, bool | int | float | str) for value in values):
        raise ValueError("must be numbers, texts, true, false or null")
    kinds = {_type_name(value) for value in values if value is not None}
    if len(kinds) > 1:
        raise ValueError(f"must be of one type, got {' and '.join(sorted(kinds))}")
    if len(set(values)) < len(values):
        raise ValueError("values must differ")
    return values


def _type_name(value: Scalar) -> str:
    names = {bool: "true/false", str: "text", int: "number", float: "number"}
    return names.get(type(value), "none")


def _require_one_kind(schema: dict[str, Any]) -> None:
    """Add to a JSON schema what `_Searched._has_one_kind` checks."""
    rule = {name: schema.pop(name) for name in ("type", "properties", "additionalProperties")}
    rule["oneOf"] = [{"required": [kind]} for kind in rule["properties"] if kind != "when"]
    schema["anyOf"] = [{"const": "default"}, rule]


class _Searched(BaseModel):
    """What a space file has for a searched key: one kind with its values, perhaps a condition."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_require_one_kind)

    default: None = Field(None, description="The natural range.")
    when: dict[str, Any] = Field(
        {},
        description="Part of a trial only if each of these searched keys has such a value.",
        json_schema_extra={"propertyNames": {"enum": [*TUNABLE]}},
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_kind(cls, content: Any) -> Any:
        content = {"default": None} if content == "default" else content
        if not isinstance(content, dict):
            raise ValueError("must be `default` or {kind: values}")
        known = [kind for kind in (*KINDS, "default") if kind in cls.model_fields]
        kinds = [kind for kind in content if kind != "when"]
        if len(kinds) != 1 or kinds[0] not in known:
            raise ValueError(f"must have one of {', '.join(known)}")
        return content


def _range_type(kind: Kind, rules: Sequence[Any]) -> Any:
    """Return the type of a range whose ends keep the rules of the key."""
    above_0 = [Field(gt=0)] if kind.startswith("log_") else []
    end: Any = Annotated[(int if kind.endswith("int") else float, *rules, *above_0)]
    about = Field(description="[low, high], both ends included.", strict=False)
    return Annotated[tuple[end, end], about, BeforeValidator(functools.partial(_check_range, kind))]


def _searched(key: str) -> Any:
    """Return type and description of what a space file has for a key: the kinds that fit its type.

    Text has choices alone, a whole number `int` and `log_int` too, any other number all kinds.
    """
    owner, name = dict(_OWNERS)["vlm." if "." in key else ""], key.removeprefix("vlm.")
    value = get_type_hints(owner, include_extras=True)[name]
    kinds: dict[str, Any] = {}
    number = next((part for part in get_args(value) if get_origin(part) is Annotated), value)
    if get_origin(number) is Annotated:
        base, *rules = get_args(number)
        ranges = KINDS[:-1] if base is float else KINDS[2:4]
        kinds = {kind: _range_type(kind, rules) for kind in ranges}
    sizes = Field(min_length=1, strict=False, json_schema_extra={"uniqueItems": True})
    choices: Any = tuple.__class_getitem__((value, ...))
    kinds["choice"] = Annotated[choices, sizes, BeforeValidator(_check_choices)]
    fields: Any = {kind: (given, Field(default_factory=tuple)) for kind, given in kinds.items()}
    what = owner.__pydantic_fields__[name].description or ""
    about = f"{what} Natural range: {TUNABLE[key]}.".strip()
    model = create_model(key, __base__=_Searched, **fields)
    return model, Field(default_factory=dict, description=about)


@functools.cache
def search_model() -> type[BaseModel]:
    """Return the model of the section `search` of a space file, made when it is first needed."""
    keys: Any = {key: _searched(key) for key in TUNABLE}
    return create_model("Search", __config__=STRICT, **keys)


def read_parameters(content: Any) -> list[Parameter]:
    """Return the parameters that the section `search` of a space file describes, in its order.

    Raises:
        pydantic.ValidationError: one that names the rules that are broken.
    """
    search = search_model().model_validate(content)
    parameters = []
    for key in content:
        given = getattr(search, key)
        (kind,) = given.model_fields_set - {"when"}
        values = getattr(given, kind)
        if kind == "default":
            kind, values = TUNABLE[key].kind, TUNABLE[key].values
        when = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in given.when.items()}
        parameters.append(Parameter(key=key, kind=kind, values=values, when=when))
    return parameters
