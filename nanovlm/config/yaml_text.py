"""YAML in and out: the one place where the program reads or writes it.

What a value means follows the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2, 10.3.2):
`1:30`, `yes` and `2026-01-01` are text, `1e-3` is a number, `0o17` is 15. Keys are text. What
has no use in a configuration, and does harm in a damaged file, is refused with its line.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nanovlm.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 20
"""Of mappings and lists inside each other; a space file needs five."""

_TAG = "tag:yaml.org,2002:"
_LARGEST_INTEGER = 2**63 - 1
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that an escape can write, but no file name, database or terminal takes."""


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    # Python reads no number of very many digits, and makes no float of a very large one.
    digits = text.lstrip("-+").removeprefix("0o").removeprefix("0x").lstrip("0")
    value = int(text, base) if len(digits) <= 30 else _LARGEST_INTEGER + 1
    if abs(value) > _LARGEST_INTEGER:
        rule = f"whole numbers go from -{_LARGEST_INTEGER} to {_LARGEST_INTEGER}"
        raise ValueError(f"{rule}, got {_shortened(text)}")
    return value


def _finite_number(text: str) -> float:
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {_shortened(text)}")
    return value


_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_CORE_SCHEMA: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"null|Null|NULL|~|", "nN~", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _integer),
    "float": (_FLOAT, "-+.0123456789", _finite_number),
}
"""Of each kind of value that is written without quotes and is no text: its pattern, its first
characters and what it stands for; the first kind that fits counts."""


class _Refused(yaml.MarkedYAMLError):
    """YAML that cannot stand in a configuration."""

    def __init__(self, rule: str, mark: yaml.Mark) -> None:
        super().__init__(problem=rule, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with the core schema in place of YAML 1.1, and with limits."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(
                f"must not be more than {MAX_DEPTH} mappings and lists inside each other",
                self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and not isinstance(node, yaml.ScalarNode):  # they grow without bound
            assert node is not None, "an alias has a node"
            raise _Refused("an alias (*) can stand for a single value only", node.start_mark)
        return node

    def construct_value(self, node: yaml.ScalarNode) -> Any:
        """Return a value of the core schema; a tag may call it what it is not."""
        name, text = node.tag.removeprefix(_TAG), str(self.construct_scalar(node))
        pattern, _, value_of = _CORE_SCHEMA[name]
        try:
            if not re.fullmatch(pattern, text):
                raise ValueError(f"{_shortened(text)} is no {name}")
            return value_of(text)
        except ValueError as error:
            raise _Refused(str(error), node.start_mark) from None

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if found := _NO_TEXT.search(text):
            raise _Refused(f"text must not hold the character {found[0]!r}", node.start_mark)
        return text

    def construct_list(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(item, deep=True) for item in node.value]

    def construct_dict(self, node: yaml.MappingNode) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != f"{_TAG}str":
                shown = getattr(key_node, "value", "") if key_node.id == "scalar" else key_node.id
                raise _Refused(f"keys must be text, got {shown or 'none'}", key_node.start_mark)
            key = self.construct_text(key_node)
            if key in content:
                raise _Refused(f"key stands twice: {_shortened(key)}", key_node.start_mark)
            content[key] = self.construct_object(value_node, deep=True)
        return content

    def refuse(self, node: yaml.Node) -> None:
        raise _Refused(f"the tag {_shortened(node.tag)} is not read", node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first, _) in _CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])
    _Loader.add_constructor(_TAG + _name, _Loader.construct_value)
_Loader.add_constructor(f"{_TAG}str", _Loader.construct_text)
_Loader.add_constructor(f"{_TAG}seq", _Loader.construct_list)
_Loader.add_constructor(f"{_TAG}map", _Loader.construct_dict)
_Loader.add_constructor(None, _Loader.refuse)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value that `text` stands for: mappings by text, lists, text, numbers, None.

    Raises:
        UserError: names `source`, in a text of several lines the line, and the rule.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _Refused as error:
        assert error.problem_mark is not None, "each has its mark"
        line = f", line {error.problem_mark.line + 1}" if "\n" in text else ""
        raise UserError(f"{source}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two of "\UFFFFFFFF"
        raise UserError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that the YAML file `path` holds; an empty file is an empty mapping."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: is no configuration: it has more than {MAX_BYTES:,} bytes")
    mapping = parse_yaml(text, str(path))
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        kind = "a list" if isinstance(mapping, list) else _shortened(repr(mapping))
        raise UserError(f"{path}: must be a mapping (`key: value` lines), got {kind}")
    return mapping


def write_yaml(content: Any) -> str:
    """Return YAML from which `parse_yaml` and readers of YAML 1.1 read `content` again."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
