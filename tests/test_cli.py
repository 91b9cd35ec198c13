"""The command that goes on is the one that was called."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm.process import usable_cpus

REPOSITORY = Path(__file__).parents[1]

PROGRAM = """
import sys
sys.path.insert(0, {repository!r})
from nanovlm import cli
print(cli.command([*sys.argv[1:], "--resume"]))
"""


@pytest.mark.parametrize(
    "called",
    [
        [sys.executable, "{folder}/a program.py"],
        [sys.executable, "-u", "-X", "utf8", "a program.py"],
        ["./python", "../work/a program.py"],
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--name", "a b", "lr_mp=1e-3"]])
def test_it_begins_as_the_program_was_called(
    called: list[str], arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a program.py").write_text(PROGRAM.format(repository=str(REPOSITORY)))
    (folder / "python").symlink_to(sys.executable)
    command = [word.format(folder=folder) for word in called] + arguments
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(2):  # and the command that it shows again
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        shown = shlex.split(done.stdout)
        assert shown == [*command, "--resume"]
        command = shown


def test_the_processors_of_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert usable_cpus() == os.cpu_count()


def test_a_program_whose_main_thread_waits_for_ever_ends_with_its_error() -> None:
    code = (
        "from nanovlm import process\nprocess.listen()\n"
        "import threading\nfrom nanovlm import cli\nfrom nanovlm.errors import RunFailed\n"
        "def main():\n"
        "    threading.Timer(0.1, lambda: process.abandon(RunFailed('the head is lost'))).start()\n"
        "    with process.on_abandon(lambda error: print('recorded:', error)):\n"
        "        threading.Event().wait()\n"
        "cli.run_program(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "recorded: the head is lost\n",
        "error: the head is lost\n",
    )
