"""Every command that the documents and `--help` show is parsed by its own program.

`WHERE_RUN` says of each by which test it is run, or why by none. `python` programs are parsed by
their own argparse, `make` targets by the Makefile, and so on (`PARSERS`). Space files are loaded.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from nanovlm.config.sources import load_config, parse_overrides
from nanovlm.config.space import load_space
from nanovlm.data.digits import digits_benchmark_rows
from tests.doc_commands import Command, document_commands, shown_commands

REPOSITORY = Path(__file__).parents[1]
COMMANDS = shown_commands()

WHERE_RUN = {
    r"python run_search.py --space search_spaces/digits.yaml": "programs/conftest.py, smaller",
    r"python run_search.py --space search_spaces/digits.yaml .+": "the same, with other options",
    r"python run_search.py --space search_spaces/digits-tiles.yaml": "the same, another preset",
    r"python run_(search|single).py (--space|--preset) .+ --submit .+": "programs/test_jobs.py",
    r"python run_search.py --space (my_space.yaml|FILE)( (?!.*--submit).+)?": "tests/programs/ has "
    "such",
    r"python run_search.py --space search_spaces/(lr|full|fine).yaml.*": "hub; "
    "programs/test_hub_search",
    r"python -m run_search --space search_spaces/digits.yaml --dry-run": "tests/test_wheel.py",
    r"python -m nanovlm dashboard results.+": "tests/test_dashboard.py",
    r"python -m nanovlm (dashboard|push --checkpoint) s3://.+": "tests/watch/test_bucket.py",
    r"python run_single.py --preset digits(-tiles)?( (?!.*--submit).+)?": "as the next, with "
    "another configuration",
    r"python run_single.py --config results/digits/best.yaml( .+)?": "programs/test_single_program",
    r"python run_single.py --preset nanovlm-(222m|450m|460m-8k|230m-8k)( .+)?": "hub and GPU",
    r"python run_single.py 'train_dataset_name=.+": "hub; data/test_mixture",
    r"python run_single.py train_dataset_path=HuggingFaceM4/FineVision .+": "hub; data/"
    "test_prepared.py has its columns",
    r"python run_single.py resume_from_vlm_checkpoint=true .+": "hub; tests/models/test_v02.py",
    r"python -m nanovlm generate --checkpoint results/digits/best .+": "programs/"
    "test_search_program.py",
    r"python -m nanovlm generate --checkpoint s3://.+": "tests/watch/test_bucket.py",
    r"python -m nanovlm generate --checkpoint lusxvr/.+": "hub; programs/test_generate_program.py",
    r"python -m nanovlm push (?!.*s3://).+": "hub; programs/test_push_program.py",
    r"python -m nanovlm data .+": "tests/test_prepared_data.py",
    r"python -m nanovlm report .+": "tests/watch/test_report.py",
    r"python -m nanovlm schema.*": "tests/config/test_space_schema.py",
    r"python -m pytest .+": "is the suite itself",
    r"python benchmarks/.+": "minutes to hours; docs/benchmarks.md has what they measured",
    r"python3? -m venv .+": "makes an environment",
    r"python -m lmms_eval .+": "tests/evaluation/test_lmms_eval.py, where lmms-eval is installed",
    r"make .+": "what continuous integration does",
    r"pip install .+": "changes what is installed",
    r"docker (run|build) .+": "needs Docker; tests/test_deploy.py looks at the files",
    r"kubectl .+": "needs Kubernetes; tests/test_deploy.py looks at the files",
    r"sbatch .+": "needs Slurm; tests/test_deploy.py runs the script with a srun of its own",
    r"(wandb|tensorboard) .+": "programs of others; tests/watch/ has what they read",
    r"pre-commit install": "changes the git repository",
    r"ray get-auth-token.*": "prints a secret",
    r"ray metrics launch-prometheus": "downloads Prometheus",
    r"ray start --head( --port=6379)?": "tests/cluster/test_joining.py",
    r"ray start --address=FIRST:6379": "tests/cluster/test_joining.py",
    r"ray stop": "ends all Ray of the machine",
    r"ray job .+": "tests/programs/test_jobs.py",
}
"""Pattern of the whole command: the test that runs it, or why none does."""

PLACEHOLDERS = {"FILE": "my_space.yaml", "NAME": "digits"}


class Parsed(BaseException):
    """Comes out of a program that has read its arguments; no program catches it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like this repository, in which the commands are typed."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("search_spaces", "nanovlm", "benchmarks", "tests", "Makefile"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "my_space.yaml").write_text("preset: digits\nsearch: {lr_mp: default}\n")
    digits_benchmark_rows()[0]["image"].save(folder / "digit.png")
    return folder


def parse_python(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read its arguments, and what it would read first of the files they name."""
    if words[:2] == ["-m", "venv"]:
        return
    if words[:2] == ["-m", "lmms_eval"]:  # need not be installed
        adapter = (REPOSITORY / "nanovlm/evaluation/lmms_eval.py").read_text()
        names = re.findall(r"(\w+)=", words[words.index("--model_args") + 1])
        assert f'MODEL_ID = "{words[words.index("--model") + 1]}"' in adapter
        assert [name for name in names if f'"{name}"' not in adapter] == []
        return
    if words[0] == "-m" and words[1] == "pytest":
        assert [path for path in words[2:] if not Path(path).exists()] == []
        return
    arguments = parsed_arguments(words, monkeypatch)
    if words[0] == "run_search.py":
        load_space(arguments.space, parse_overrides(arguments.overrides))
    elif words[0] == "run_single.py":
        preset = Path("nanovlm/config/presets/digits.yaml")  # best.yaml is made by a search
        config = arguments.config and preset
        load_config(config, arguments.preset, parse_overrides(arguments.overrides))


def parsed_arguments(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return what the program makes of its arguments; it goes no further."""
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parse_only(
            *given: Any, _parse: Callable[..., argparse.Namespace] = parse, **named: Any
        ) -> argparse.Namespace:
            raise Parsed(_parse(*given, **named))

        monkeypatch.setattr(argparse.ArgumentParser, method, parse_only)
    is_module = words[0] == "-m"
    monkeypatch.setattr("sys.argv", list(words[1:] if is_module else words))
    monkeypatch.setattr("sys.path", list(sys.path))  # a benchmark adds to it
    # The process of the tests is not the program: its signals stay what they are.
    monkeypatch.setattr("nanovlm.process.listen", lambda: None)
    with pytest.raises(Parsed) as parsed:
        if is_module:
            monkeypatch.delitem(
                sys.modules, f"{words[1]}.__main__", raising=False
            )  # or runpy warns
            runpy.run_module(words[1], run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    return parsed.value.arguments


def parse_make(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def parse_pip(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words in (["install", "tensorboard"], ["install", "."]) or "lmms-eval==0.7.3" in words:
        return
    if words[:2] == ["install", "."]:  # with other packages beside it
        assert not [word for word in words if word.startswith("-")]
        return
    assert words[:2] == ["install", "-e"]
    (extras,) = re.findall(r"^\.\[(.+)\]$", words[2])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def parse_docker(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["build", "-f"]:
        assert (REPOSITORY / words[2]).exists() and words[-1] == "."
        return
    mounted = [word.partition(":")[0] for word in words if word.startswith("$PWD/")]
    assert mounted
    assert [
        path for path in mounted if not (REPOSITORY / path.removeprefix("$PWD/")).exists()
    ] == []


def parse_wandb(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.cli.cli import cli

    assert words[0] in cli.commands


def parse_tensorboard(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "--logdir" and words[1].endswith("/tensorboard")


def parse_ray(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.scripts.scripts import cli

    name, *options = words
    if "--" in options:  # as a shell reads it
        parse_python(options[options.index("--") + 2 :], monkeypatch)
    command = cli.commands[name]
    if isinstance(command, click.Group):
        name, *options = options
        command = command.commands[name]
    command.make_context(name, options)


def parse_kubectl(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[:2] == ["apply", "-f"] and (REPOSITORY / words[2]).exists()


def parse_sbatch(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = (number for number, word in enumerate(words) if word.endswith(".sh"))
    assert (REPOSITORY / words[script]).exists()
    parse_python(["run_search.py", *words[script + 1 :]], monkeypatch)


def parse_pre_commit(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words == ["install"] and (REPOSITORY / ".pre-commit-config.yaml").exists()


PARSERS: dict[str, Callable[[Sequence[str], pytest.MonkeyPatch], None]] = {
    "python": parse_python,
    "python3": parse_python,
    "make": parse_make,
    "pip": parse_pip,
    "ray": parse_ray,
    "docker": parse_docker,
    "kubectl": parse_kubectl,
    "sbatch": parse_sbatch,
    "wandb": parse_wandb,
    "tensorboard": parse_tensorboard,
    "pre-commit": parse_pre_commit,
}
"""By the first word of a command."""


def rules_for(command: str) -> list[str]:
    return [rule for rule in WHERE_RUN if re.fullmatch(rule, command)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_can_be_typed(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(rules_for(str(command))) == 1, (
        f"{command.place}: say in WHERE_RUN of tests/test_commands.py where {str(command)!r} is run"
    )
    program, *words = command.words
    assert program in PARSERS, f"{command.place}: add a parser of {program} to PARSERS"
    monkeypatch.chdir(place)
    names = r"\b(" + "|".join(PLACEHOLDERS) + r")\b"
    filled = [re.sub(names, lambda found: PLACEHOLDERS[found[1]], word) for word in words]
    PARSERS[program](filled, monkeypatch)


def test_every_rule_has_a_command() -> None:
    used = {rule for command in COMMANDS for rule in rules_for(str(command))}
    assert WHERE_RUN.keys() - used == set()


DOCUMENT = """
To begin:

    python run_search.py --space \\
        my.yaml     # a comment

A list:

- an item that goes on
    over two lines

```console
$ HF_HOME=/x .venv/bin/python -m nanovlm push
what it prints
```

```yaml
make: no command
```

Or `make demo`, but not `trials.jsonl`; and `python
run_single.py --preset digits` as well.
"""


def test_commands_are_found_in_a_document() -> None:
    found = [(c.place, str(c)) for c in document_commands("x.md", DOCUMENT)]
    assert found == [
        ("x.md:4", "python run_search.py --space my.yaml"),
        ("x.md:12", "python -m nanovlm push"),
        ("x.md:21", "make demo"),
        ("x.md:21", "python run_single.py --preset digits"),
    ]


@pytest.mark.parametrize(
    "text", ["    nobody knows this\n", "```fish\nls\n```\n", "```\nconda install x\n```\n"]
)
def test_what_may_be_a_command_is_not_passed_over(text: str) -> None:
    try:
        found = list(document_commands("x.md", text))
    except AssertionError:
        return
    assert [rules_for(str(command)) for command in found] == [[]]


@pytest.mark.parametrize(
    "command",
    [
        "run_search.py --space my_space.yaml --trails 3",
        "run_search.py --space my_space.yaml --trials 0",
        "run_single.py --preset digits --worker two",
        "-m nanovlm data remove",
        "benchmarks/demo.py --spaces x",
    ],
)
def test_a_wrong_argument_is_found(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        parse_python(shlex.split(command), monkeypatch)
