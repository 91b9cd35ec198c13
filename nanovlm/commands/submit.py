"""What `--submit` does: the program runs itself as a job of a Ray cluster, and follows its log.

What is uploaded is the package, the two programs and the files that the command names. The machines
of the cluster need the other packages, and the folders that the configuration names.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanovlm import cli
from nanovlm.cluster.jobs import Jobs
from nanovlm.config.database_url import hide_password
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import config_values, flat_values, parse_overrides
from nanovlm.config.space import SearchSpace, find_space
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import ErrorCollector, RunFailed, UserError
from nanovlm.files import user_path
from nanovlm.results.folder import check_kept, check_name
from nanovlm.watch.terminal.console import PLAIN, make_console

PROGRAMS = Path(__file__).parents[2]
"""Where the package and the programs lie, in a checkout and where they are installed."""
GIVEN = "given"
"""Folder of the upload for files from outside the folder in which the command was typed."""


def submit_search(arguments: argparse.Namespace, space: SearchSpace) -> int:
    """Run `run_search.py` with these arguments as a job; see `submit`."""
    path = find_space(arguments.space)
    sections = read_mapping(path) | parse_overrides(arguments.overrides)
    check_job(arguments, space.base, space.warm_start)
    check_password(space.study.storage)
    return submit(arguments, "run_search.py", {"--space": path}, sections.get("preset"))


def submit_single(arguments: argparse.Namespace, config: TrainConfig) -> int:
    """Run `run_single.py` with these arguments as a job; see `submit`."""
    check_job(arguments, config)
    files = {"--config": arguments.config} if arguments.config else {}
    return submit(arguments, "run_single.py", files, arguments.preset)


def submit(
    arguments: argparse.Namespace, program: str, files: Mapping[str, Path], preset: str | None
) -> int:
    """Run a program as a job and show its log; return the exit code of its end.

    Ctrl-C leaves the job running and ends the program here with the code of an interruption, since
    0 says that a search has ended well.

    Args:
        files: that options name, by option; they are uploaded.
        preset: name or file; a file at a relative path is uploaded too.

    Raises:
        UserError: the cluster does not take the job.
        RunFailed: the cluster does not answer any more.
    """
    jobs = Jobs(arguments.submit)
    with tempfile.TemporaryDirectory(prefix="nanovlm-") as folder:
        words = ["python", program, *stage(Path(folder), files, preset), *other_words(files)]
        words += [] if arguments.resume else ["--resume-if-exists"]
        job_id = jobs.submit(shlex.join(words), Path(folder))
    console = make_console()
    look = f"ray job logs --follow {job_id} --address {jobs.address}"
    console.print(
        f"job {job_id} runs on the Ray cluster at {jobs.address}; Ctrl-C here leaves it running\n"
        f"look again:      {look}\n"
        f"end it in order: ray job stop {job_id} --address {jobs.address}\n"
        f"then go on:      the same command again\n",
        **PLAIN,
    )
    end = jobs.follow(job_id, lambda text: console.out(text, end="", highlight=False))
    if end is None:
        console.print(f"\njob {job_id} goes on; look again:\n{look}", **PLAIN)
        return cli.INTERRUPTED
    code = exit_code(end.status, end.driver_exit_code)
    console.print(f"\njob {job_id}: {end.status.lower()}", **PLAIN)
    if code == cli.FAILED and end.driver_exit_code is None:
        raise RunFailed(f"the program was not started: {end.message}")
    return code


def exit_code(status: str, code: int | None) -> int:
    """Return the exit code for the end of a job, and for the code of its program if it had one."""
    if status == "SUCCEEDED":
        return cli.DONE
    if status == "STOPPED":
        return cli.INTERRUPTED
    return code if code in (cli.WRONG_INPUT, cli.INTERRUPTED) else cli.FAILED


def stage(folder: Path, files: Mapping[str, Path], preset: str | None) -> list[str]:
    """Fill the folder with what the job needs; return the words that name the files in it."""
    shutil.copytree(
        PROGRAMS / "nanovlm", folder / "nanovlm", ignore=shutil.ignore_patterns("__pycache__")
    )
    for program in ("run_search.py", "run_single.py"):
        shutil.copy(PROGRAMS / program, folder)
    for path in files.values():
        _copy(path, folder)
    if preset is not None and preset.endswith((".yaml", ".yml")):
        path = user_path(preset)
        if not path.is_absolute() and ".." not in path.parts:
            _copy(path, folder)
    return [word for option, path in files.items() for word in (option, str(_name(path)))]


def _name(path: Path) -> Path:
    """Return the path of an uploaded file, below the job's folder."""
    is_inside = not path.is_absolute() and ".." not in path.parts
    return path if is_inside else Path(GIVEN) / path.name


def _copy(path: Path, folder: Path) -> None:
    target = folder / _name(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def other_words(files: Mapping[str, Path]) -> list[str]:
    """Return the arguments of this program without --submit and the options of these files."""
    parser = argparse.ArgumentParser(add_help=False)
    for option in ("--submit", *files):
        parser.add_argument(option)
    return parser.parse_known_args(sys.argv[1:])[1]


def check_job(
    arguments: argparse.Namespace, config: TrainConfig, warm_start: Sequence[str] = ()
) -> None:
    """Raise UserError for what cannot be, or means something else, on the cluster than here."""
    problems = ErrorCollector()
    if arguments.address is not None:
        problems.messages.append(
            "--submit: cannot stand beside --address: a job runs on the cluster it is submitted to"
        )
    with problems:
        check_kept(arguments.results, is_job=True)
    with problems:
        if arguments.name is not None:
            check_name(arguments.name)
    values = flat_values(config_values(config))
    named = [(key, values[key]) for key in cli.FOLDER_KEYS]
    named += [("more_benchmarks", path) for path in config.more_benchmarks]
    for key, value in [*named, *(("warm_start", path) for path in warm_start)]:
        if value and not Path(value).is_absolute() and Path(value).exists():
            problems.messages.append(
                f"--submit: {key}: {value} is at a relative path, which names nothing on the "
                "cluster; give the absolute path that it has there"
            )
    problems.raise_if_any()


def check_password(storage: str | None) -> None:
    """Raise UserError if the URL of a database holds its password.

    Ray shows the command and the files of a job to all who may look at its dashboard.
    """
    if storage is not None and hide_password(storage) != storage:
        raise UserError(
            "--submit: study.storage: Ray shows a job's command and files in its dashboard; write "
            "${NANOVLM_DB_PASSWORD} for the password, and set that where the head is started"
        )
