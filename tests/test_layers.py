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
    (
        "config",
        "config_files",
        "errors",
        "files",
        "identifiers",
        "interrupts",
        "machine",
        "messages",
        "metrics",
        "observer",
        "records",
        "search.database_url",
        "search.parameter",
        "search.sections",
        "search.space",
        "yaml_text",
    ),
    ("models", "data", "parallel", "results", "tracking"),
    ("training", "evaluation"),
    ("resources", "trial"),
    ("distributed",),
    ("search",),
    (
        "__main__",
        "cli",
        "commands",
        "output",
        "run_search",
        "run_single",
        "space_schema",
    ),
)
"""The areas of the project, lowest layer first. An area is a module or a package."""

FIRST_LAYER_WITH_RAY = 4
SEPARATE_LAYER = 1  # its areas know nothing of each other
LAYER_0_PACKAGES = {"yaml", "pydantic", "pydantic_core"}


def area_of(name: str) -> str | None:
    """Return the area that the dotted `name` lies in, None if no layer lists it."""
    name = name.removeprefix("nanovlm.")
    areas = [a for layer in LAYERS for a in layer if f"{name}.".startswith(f"{a}.")]
    return max(areas, key=len, default=None)  # search.space before search


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
        if layer_of(other) > layer:
            return f"(layer {layer}) imports {imported} (layer {layer_of(other)})"
        if layer_of(other) == layer == SEPARATE_LAYER and other != area:
            return f"imports its neighbour {imported}"
    elif layer == 0 and package not in sys.stdlib_module_names | LAYER_0_PACKAGES:
        return f"(layer 0) imports {package}"
    elif package == "ray" and layer < FIRST_LAYER_WITH_RAY:
        return f"(layer {layer}) imports ray"
    return None


def violations(root: Path) -> list[str]:
    """Return every import under `root` that breaks a rule, and the first cycle."""
    imports: dict[str, set[str]] = {}
    for path in [*root.glob("nanovlm/**/*.py"), *root.glob("run_*.py")]:
        if path.name != "__init__.py":  # these are empty, see below
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


def test_init_files_are_empty() -> None:
    full = [p for p in (REPOSITORY / "nanovlm").rglob("__init__.py") if p.read_text()]
    assert full == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("nanovlm/config.py", "import torch", "(layer 0) imports torch"),
        ("nanovlm/search/space.py", "from optuna import Study", "(layer 0) imports optuna"),
        ("nanovlm/models/vit.py", "from nanovlm.data.batches import Batch", "its neighbour"),
        ("nanovlm/data/batches.py", "from nanovlm.models import vit", "its neighbour"),
        ("nanovlm/results/store.py", "import nanovlm.parallel", "its neighbour"),
        ("nanovlm/results/store.py", "from nanovlm.trial import run_trial", "(layer 3)"),
        ("nanovlm/results/store.py", "from nanovlm.commands.report import main", "(layer 6)"),
        ("nanovlm/trial.py", "def f() -> None:\n    import ray.train", "(layer 3) imports ray"),
        ("nanovlm/training/loop.py", "from nanovlm import trial", "nanovlm.trial (layer 3)"),
        ("nanovlm/distributed/worker.py", "from nanovlm.search.runner import x", "(layer 5)"),
        ("nanovlm/search/runner.py", "from run_search import main", "(layer 6)"),
        ("nanovlm/search/runner.py", "import nanovlm", "is in no layer"),
        ("nanovlm/extras.py", "import os", "nanovlm.extras is in no layer"),
    ],
)
def test_a_bad_import_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    _write(tmp_path, {path: source})
    [found] = violations(tmp_path)
    assert message in found


def test_a_cycle_within_a_layer_is_found(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "nanovlm/training/loop.py": "from nanovlm.evaluation.mmstar import evaluate",
            "nanovlm/evaluation/mmstar.py": "from nanovlm.training import loop",
        },
    )
    [found] = violations(tmp_path)
    assert found.startswith("import cycle: nanovlm.")


def test_good_imports_pass(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "nanovlm/search/space.py": "import yaml\nfrom nanovlm.config import TrainConfig",
            "nanovlm/search/runner.py": "import ray.tune\nfrom nanovlm.search.space import Space",
            "nanovlm/results/store.py": "import plotly\nfrom nanovlm.search.space import Space",
            "nanovlm/models/vit.py": "import torch\nfrom nanovlm.models.attention import attend",
            "run_search.py": "from nanovlm.search.runner import run\nimport nanovlm.results.store",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [("nanovlm.trial", "ray"), ("nanovlm.search.space", "torch"), ("nanovlm.messages", "torch")],
)
def test_a_lower_layer_does_not_load_what_belongs_higher(module: str, absent: str) -> None:
    code = f"import sys, {module}; assert {absent!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def _write(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
