"""Finds the commands that the documents, the heads of space files and `--help` show."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

SHELL_FENCES = {"sh", "bash", "shell", "console"}
OTHER_FENCES = {"yaml", "python", "json", "text", "toml", "mermaid", "promql", "svg"}

NOT_COMMANDS = (
    "run_search.py  run_single.py",  # the list of modules
    "search_spaces/lr.yaml",  # pictures of docs/architecture.md
    "mapped files",
    "defaults  <",  # the precedence of docs/config.md
)
"""How the indented blocks begin that are no commands. A new one may be a fence of ```text."""

INLINE = re.compile(r"`((?:\S+=\S+ )*(?:python|\.venv/bin/\w+|make|ray|pip) [^`]+)`")
"""Commands within a text or a table."""

_ITEM = re.compile(r"\s*([-*]|\d+\.) ")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")


@dataclass(frozen=True)
class Command:
    """A command as it is shown, without comment, environment and the folder of the python."""

    place: str
    """File and line."""
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def shown_commands() -> list[Command]:
    """Return all commands that a reader is told to type; each once."""
    found: dict[str, Command] = {}
    for command in _all_commands():
        found.setdefault(str(command), command)
    return list(found.values())


def _all_commands() -> Iterator[Command]:
    for path in [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]:
        name = str(path.relative_to(REPOSITORY))
        yield from document_commands(name, path.read_text(encoding="utf-8"))
    for folder in ("search_spaces", "nanovlm/config/presets"):
        for path in sorted((REPOSITORY / folder).glob("*.yaml")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if command := re.match(r"# +(python .+)", line):
                    yield _command(f"{folder}/{path.name}:{number}", command[1])
    for path in [*REPOSITORY.glob("run_*.py"), *sorted((REPOSITORY / "nanovlm").rglob("*.py"))]:
        text = _examples(path).replace("\\\n", " ")
        for command in re.findall(r"^  (python .+)$", text, re.MULTILINE):
            yield _command(f"{path.relative_to(REPOSITORY)}: EXAMPLES", command)


def document_commands(name: str, text: str) -> Iterator[Command]:
    """Yield the commands of a document in Markdown.

    Raises AssertionError for a block of which it is not clear whether it shows commands.
    """
    for number, kind, block in _blocks(text.splitlines()):
        place = f"{name}:{number}"
        if kind == "prose":
            yield from (_command(place, shown) for shown in INLINE.findall("\n".join(block)))
        elif kind in OTHER_FENCES or (not kind and block[0].startswith(NOT_COMMANDS)):
            continue
        else:
            assert kind in SHELL_FENCES | {""}, f"{place}: is ```{kind} a shell? {OTHER_FENCES}"
            for line in _joined(block):
                if kind != "console" or line.startswith("$ "):
                    yield _command(place, line.removeprefix("$ "))


def _blocks(lines: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield line number, kind and lines of each paragraph, indented block and fence.

    The kind is `prose`, the language of a fence, or empty for indented blocks and other fences.
    """
    number = 0
    in_list = False
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if fence := re.match(r" *```(\w*)", line):
            while not lines[number].strip().startswith("```"):
                number += 1
            yield start + 1, fence[1], [text.strip() for text in lines[start + 1 : number]]
            number += 1
        elif line.startswith("    ") and not in_list:
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            yield start + 1, "", [text.strip() for text in lines[start:number] if text.strip()]
        elif line.strip():
            in_list = bool(_ITEM.match(line)) or (in_list and line.startswith(" "))
            while number < len(lines) and lines[number].strip() and "```" not in lines[number]:
                number += 1
            yield start + 1, "prose", [" ".join(lines[start:number])]


def _joined(lines: list[str]) -> list[str]:
    """Return the lines, those that end with a backslash together with the next."""
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _command(place: str, line: str) -> Command:
    words = shlex.split(line, comments=True)
    while _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    program = re.sub(r"^\.venv(-lmms)?/bin/", "", words[0])
    return Command(place, (program, *words[1:]))


def _examples(path: Path) -> str:
    """Return what a program shows at the end of its `--help`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXAMPLES":
            return str(ast.literal_eval(node.value))
    return ""
