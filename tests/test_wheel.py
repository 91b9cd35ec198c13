"""The wheel holds everything: installed elsewhere, the programs run from any folder."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("nanovlm", "search_spaces", "run_search.py", "run_single.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what a wheel of this repository installs."""
    sources, wheels, target = (tmp_path_factory.mktemp(n) for n in ("sources", "wheels", "target"))
    for name in (*SOURCES, "pyproject.toml", "README.md", "LICENSE"):
        source = REPOSITORY / name
        if source.is_dir():  # other tests write compiled code there meanwhile
            no_code = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, sources / name, ignore=no_code)
        else:
            shutil.copy(source, sources / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, str(sources), "--wheel-dir", str(wheels)], check=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, folder: Path, *words: str) -> str:
    """Return what a program prints that runs in `folder`, with the installed packages first."""
    path = os.pathsep.join([str(installed), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_file_is_in_the_wheel(installed: Path) -> None:
    shipped = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for name in SOURCES:
        source = REPOSITORY / name
        for path in source.rglob("*") if source.is_dir() else [source]:
            if path.is_file() and path.suffix != ".pyc":
                assert str(path.relative_to(REPOSITORY)) in shipped


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_lmms_eval_is_told_where_its_adapter_is(installed: Path) -> None:
    """It asks the installed packages for this group; the function is found without importing it."""
    (found,) = (
        entry
        for distribution in importlib.metadata.distributions(path=[str(installed)])
        for entry in distribution.entry_points.select(group="lmms_eval.models")
    )
    source = installed / f"{found.module.replace('.', '/')}.py"
    names = [n.name for n in ast.parse(source.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert found.name == "nanovlm_search"
    assert found.attr in names


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_programs_run_in_any_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import nanovlm.config.space as s; print(s.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    space = ["-m", "run_search", "--space", "search_spaces/digits.yaml"]
    assert "lr_backbones:" in run(installed, tmp_path, *space, "--dry-run")
    assert "--preset" in run(installed, tmp_path, "-m", "run_single", "--help")
    schema = (REPOSITORY / "search_spaces" / "space.schema.json").read_text()
    assert run(installed, tmp_path, "-m", "nanovlm", "schema") == schema


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_gets_the_installed_package(installed: Path, tmp_path: Path) -> None:
    code = "from pathlib import Path; from nanovlm.commands.submit import stage"
    code += "; stage(Path('job'), {'--config': Path('c.yaml')}, None)"
    (tmp_path / "c.yaml").touch()
    run(installed, tmp_path, "-c", code)
    for name in ("nanovlm", "run_search.py", "run_single.py"):
        for path in (installed / name).rglob("*.py") if name == "nanovlm" else [installed / name]:
            assert (tmp_path / "job" / path.relative_to(installed)).exists()
