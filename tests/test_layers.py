"""Imports point down: the layers of docs/architecture.md, held against every import statement.

An import inside a function counts like one at the top of a file.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

LAYERS = (
    ("errors",),
    ("files", "process"),
    ("config",),
    ("messages",),
    ("records",),
    ("downloads",),
    ("tokenizer_files",),
    ("models", "data", "results", "parallel"),
    ("training",),
    ("evaluation", "hub", "samplers", "pruning", "watch"),
    ("resources",),
    ("trial",),
    ("cluster",),
    ("search",),
    ("cli",),
    ("commands",),
    ("__main__",),
    ("run_search", "run_single"),
)
"""The folders and modules of the project, lowest layer first; those of one layer know nothing of
each other."""

LIGHT_PACKAGES = {"yaml", "pydantic", "pydantic_core", "psutil"}
"""All that what lies below `downloads` may import besides the standard library."""


def area_of(name: str) -> str | None:
    """Return the folder or module below `nanovlm` that the dotted `name` lies in."""
    first = name.removeprefix("nanovlm.").partition(".")[0]
    return first if any(first in layer for layer in LAYERS) else None


def layer_of(area: str) -> int:
    return next(number for number, areas in enumerate(LAYERS) if area in areas)


def imported_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def objection(module: str, imported: str) -> str | None:
    """Return why `module` may not import the dotted name `imported`."""
    area = area_of(module)
    if area is None:
        return "is in no layer"
    layer = layer_of(area)
    package = imported.partition(".")[0]
    if package in ("nanovlm", "run_search", "run_single"):
        other = area_of(imported)
        if other is None:
            return f"imports {imported}, which is in no layer"
        if other != area and layer_of(other) >= layer:
            return f"(layer {layer}) imports {imported} (layer {layer_of(other)})"
    elif layer < layer_of("downloads") and package not in sys.stdlib_module_names | LIGHT_PACKAGES:
        return f"imports {package}, which is too heavy for it"
    elif package == "ray" and layer < layer_of("cluster"):
        return f"(layer {layer}) imports ray"
    return None


def violations(root: Path) -> list[str]:
    """Return every import under `root` that breaks a rule, and the first cycle."""
    imports: dict[str, set[str]] = {}
    for path in [*root.glob("nanovlm/**/*.py"), *root.glob("run_*.py")]:
        if path.name != "__init__.py":  # these import nothing, see below
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            imports[module] = set(imported_names(path.read_text(encoding="utf-8")))
    found = [
        f"{module} {reason}"
        for module, names in imports.items()
        for name in sorted(names)
        if (reason := objection(module, name))
    ]
    graph = {
        module: {m for m in imports if any(f"{n}.".startswith(f"{m}.") for n in names)}
        for module, names in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' -> '.join(error.args[1])}")
    return found


def test_imports_point_down() -> None:
    assert violations(REPOSITORY) == []


def test_a_folder_says_what_it_is_and_no_more() -> None:
    for path in (REPOSITORY / "nanovlm").rglob("__init__.py"):
        [docstring] = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), path
        assert isinstance(docstring.value, ast.Constant), path


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("nanovlm/config/schema.py", "import torch", "imports torch"),
        ("nanovlm/config/space.py", "from optuna import Study", "imports optuna"),
        ("nanovlm/models/vit.py", "from nanovlm.data.samples import Batch", "nanovlm.data.samples"),
        ("nanovlm/samplers/tpe.py", "from nanovlm.pruning import rungs", "nanovlm.pruning"),
        ("nanovlm/results/write.py", "import nanovlm.parallel", "imports nanovlm.parallel"),
        ("nanovlm/results/write.py", "from nanovlm.trial import run_trial", "nanovlm.trial"),
        ("nanovlm/results/read.py", "from nanovlm.commands.push import run", "commands.push"),
        ("nanovlm/trial.py", "def f() -> None:\n    import ray.train", "imports ray"),
        ("nanovlm/training/loop.py", "from nanovlm import trial", "imports nanovlm.trial"),
        ("nanovlm/cluster/worker.py", "from nanovlm.search.run import x", "nanovlm.search.run"),
        ("nanovlm/search/run.py", "from run_search import main", "imports run_search"),
        ("nanovlm/search/run.py", "import nanovlm", "is in no layer"),
        ("nanovlm/extras.py", "import os", "nanovlm.extras is in no layer"),
    ],
)
def test_a_bad_import_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    _write(tmp_path, {path: source})
    [found] = violations(tmp_path)
    assert message in found


def test_a_cycle_within_a_folder_is_found(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "nanovlm/training/loop.py": "from nanovlm.training.steps import Steps",
            "nanovlm/training/steps.py": "from nanovlm.training import loop",
        },
    )
    [found] = violations(tmp_path)
    assert found.startswith("import cycle: nanovlm.")


def test_good_imports_pass(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "nanovlm/config/space.py": "import yaml\nfrom nanovlm.config.schema import TrainConfig",
            "nanovlm/search/run.py": "import ray.tune\nfrom nanovlm.config.space import Space",
            "nanovlm/results/write.py": "import scipy\nfrom nanovlm.config.space import Space",
            "nanovlm/models/vit.py": "import torch\nfrom nanovlm.models.attention import attend",
            "run_search.py": "from nanovlm.search.run import run\nimport nanovlm.results.write",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("nanovlm.trial", "ray"),
        ("nanovlm.config.space", "torch"),
        ("nanovlm.messages", "torch"),
        ("run_search", "torch"),  # --help, and what is wrong with the input, come at once
        ("run_search", "ray"),
        ("run_search", "scipy.stats"),
        ("run_single", "torch"),
        ("nanovlm.__main__", "torch"),
    ],
)
def test_a_lower_layer_does_not_load_what_belongs_higher(module: str, absent: str) -> None:
    code = f"import sys, {module}; assert {absent!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def _write(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
