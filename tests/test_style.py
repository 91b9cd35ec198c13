"""Limits on size, typed signatures and no stray print(), held against every source file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LIBRARY = sorted(REPOSITORY.glob("nanovlm/**/*.py"))
PROGRAMS = sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("benchmarks/**/*.py")])


def complaints(source: str, may_print: bool) -> Iterator[str]:
    """Yield what the text of a source file does against the rules, with the line."""
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"1: the file has {num_lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for complaint in function_complaints(node):
                yield f"{node.lineno}: {node.name} {complaint}"
        elif isinstance(node, ast.Name) and node.id == "print" and not may_print:
            yield f"{node.lineno}: print()"


def function_complaints(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    assert function.end_lineno is not None
    num_lines = function.end_lineno - function.lineno + 1
    if num_lines > MAX_FUNCTION_LINES:
        yield f"has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    for arg in [*named, *filter(None, (args.vararg, args.kwarg))]:
        if arg.annotation is None and arg.arg not in ("self", "cls"):
            yield f"does not say the type of {arg.arg}"
    if function.returns is None:
        yield "does not say what it returns"


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_source_file_keeps_the_rules(path: Path) -> None:
    assert list(complaints(path.read_text(encoding="utf-8"), may_print=path in PROGRAMS)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n" * 401, "1: the file has 401 lines, at most 400"),
        ("def f() -> None:\n" + "    pass\n" * 60, "1: f has 61 lines, at most 60"),
        ("class A:\n    def f(self, x) -> None: ...", "2: f does not say the type of x"),
        ("async def f(*, x): ...\n", "1: f does not say the type of x"),
        ("def f(**options): ...\n", "1: f does not say the type of options"),
        ("def f(): ...\n", "1: f does not say what it returns"),
        ("x = 1\nprint(x)\n", "2: print()"),
    ],
)
def test_a_breach_is_found(source: str, message: str) -> None:
    assert message in complaints(source, may_print=False)


def test_what_keeps_the_rules_passes() -> None:
    source = "class A:\n    def f(self, x: int, *y: str) -> None:\n" + "        pass\n" * 59
    assert list(complaints(source, may_print=False)) == []
    assert list(complaints("print(1)", may_print=True)) == []
