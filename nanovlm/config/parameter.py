"""One searched key of a space: its kind, its values and the condition under which it is active."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from nanovlm.config.schema import Scalar, TrainConfig, Tunable, VLMConfig
from nanovlm.errors import UserError, did_you_mean

Kind = Literal["uniform", "log_uniform", "int", "log_int", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TUNABLE: dict[str, Tunable] = {
    prefix + field.name: field.metadata["tunable"]
    for prefix, owner in (("", TrainConfig), ("vlm.", VLMConfig))
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


def read_parameter(place: str, key: str, content: Any) -> Parameter:
    """Return the parameter that a space file describes.

    Args:
        place: file and key path, for messages.
        key: of a `TrainConfig`, or `vlm.KEY`.
        content: `default`, or a mapping such as `{log_uniform: [1e-4, 1e-1]}` with an optional
            `when: {other_key: [values]}`.

    Raises:
        UserError: one that names the rule that is broken.
    """
    if key not in TUNABLE:
        raise UserError(f"{place}: this key cannot be searched.{did_you_mean(key, TUNABLE)}")
    content = {"default": None} if content == "default" else content
    if not isinstance(content, dict):
        raise UserError(f"{place}: must be `default` or {{kind: values}}, got {content!r}")
    when = {
        other: tuple(values) if isinstance(values, list) else (values,)
        for other, values in _mapping(f"{place}: when", content.get("when", {})).items()
    }
    kinds = [kind for kind in content if kind != "when"]
    known = (*KINDS, "default")
    if len(kinds) != 1 or kinds[0] not in known:
        raise UserError(f"{place}: must have one of {', '.join(known)}, got {kinds}")
    if kinds[0] == "default":
        natural = TUNABLE[key]
        return Parameter(key=key, kind=natural.kind, values=natural.values, when=when)
    values = content[kinds[0]]
    if not isinstance(values, list):
        raise UserError(f"{place}: {kinds[0]}: must be a list, got {values!r}")
    check = _check_choices if kinds[0] == "choice" else _check_range
    checked = check(f"{place}: {kinds[0]}", kinds[0], values)
    return Parameter(key=key, kind=kinds[0], values=checked, when=when)


def check_conditions(place: str, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Return the parameters ordered so that each comes after those its condition names.

    Raises:
        UserError: for a condition on a key that is not searched, on a value that it never has, or
            for conditions that wait for each other.
    """
    by_key = {parameter.key: parameter for parameter in parameters}
    messages = []
    for parameter in parameters:
        for other, values in parameter.when.items():
            where = f"{place}: search.{parameter.key}: when.{other}"
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
            raise UserError(f"{place}: search: conditions wait for each other: {waiting}")
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


def _mapping(place: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{place}: must be a mapping {{key: [values]}}, got {content!r}")
    return content


def _check_range(place: str, kind: str, values: list[Any]) -> tuple[Scalar, ...]:
    whole = kind in ("int", "log_int")
    allowed = (int,) if whole else (int, float)
    if len(values) != 2 or not all(type(value) in allowed for value in values):
        numbers = "whole numbers" if whole else "numbers"
        raise UserError(f"{place}: must be two {numbers} [low, high], got {values}")
    low, high = values
    if not low < high:
        raise UserError(f"{place}: low must be below high, got {values}")
    if kind.startswith("log_") and low <= 0:
        raise UserError(f"{place}: low must be above 0 on a log scale, got {values}")
    return tuple(values) if whole else (float(low), float(high))


def _check_choices(place: str, kind: str, values: list[Any]) -> tuple[Scalar, ...]:
    if not values:
        raise UserError(f"{place}: must have at least one value, got []")
    if not all(value is None or isinstance(value, bool | int | float | str) for value in values):
        raise UserError(f"{place}: must be numbers, texts, true, false or null, got {values}")
    kinds = {_type_name(value) for value in values if value is not None}
    if len(kinds) > 1:
        mixed = " and ".join(sorted(kinds))
        raise UserError(f"{place}: must be of one type, got {mixed}: {values}")
    if len(set(values)) < len(values):
        raise UserError(f"{place}: values must differ, got {values}")
    return tuple(values)


def _type_name(value: Scalar) -> str:
    names = {bool: "true/false", str: "text", int: "number", float: "number"}
    return names.get(type(value), "none")
