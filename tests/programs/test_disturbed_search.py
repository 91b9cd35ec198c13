"""A search that is interrupted, killed and resumed comes to what an undisturbed one comes to.

It begins on a real terminal, where nothing wraps or is left behind, small or large.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import killed
from nanovlm.results.read import FolderReader, read_records
from tests.processes import count_session, wait_until
from tests.programs.conftest import (
    REPOSITORY,
    SMALL,
    SPACE,
    Finished,
    finish,
    ray_processes,
    start_program,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class Terminal:
    """A tmux server of its own, with one window that runs a shell."""

    def __init__(self, socket: Path, folder: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket)]
        size = ("-x", "80", "-y", "24")
        shell = ("env", "PS1=$ ", "sh")  # the prompt is known, whoever runs the test
        self.run("-f", "/dev/null", "new-session", "-d", *size, "-c", str(folder), *shell)
        self.run("set-option", "-g", "window-size", "manual")
        count_session(int(self.run("display-message", "-p", "#{pane_pid}")))

    def run(self, *arguments: str) -> str:
        # A size in the environment would go before the window's own.
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        command = [*self._tmux, *arguments]
        return subprocess.run(
            command, env=inherited, capture_output=True, text=True, check=True
        ).stdout

    def type(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self.run("resize-window", "-x", str(width), "-y", str(height))

    def lines(self, *options: str) -> list[str]:
        """Return what the window shows; with `-J` a line that went over several is one again."""
        return self.run("capture-pane", "-p", *options).splitlines()

    def text(self) -> str:
        return "\n".join(self.lines())

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    def cursor_is_visible(self) -> bool:
        return self.run("display-message", "-p", "#{cursor_flag}").strip() == "1"


@pytest.fixture
def terminal(tmp_path: Path, workplace: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path / "tmux", workplace)
    yield terminal
    terminal.run("kill-server")


def test_ctrl_c_kill_and_resume_give_the_search_that_was_not_disturbed(
    search: Finished, workplace: Path, terminal: Terminal, no_ray_left: None
) -> None:
    folder = workplace / "results" / "disturbed"
    resume = interrupted_on_a_terminal(terminal)
    finished_before = read_records(folder)
    waiting = FolderReader(folder).paused(finished_before)
    assert {0, 1} <= {record.number for record in finished_before} | {*waiting} < set(range(6))

    process = start_program("run_search.py", *resume, cwd=workplace)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial "):
            break
    killed.kill(process)

    resumed = finish(start_program("run_search.py", *resume, cwd=workplace), folder)
    assert resumed.code == 0, resumed.output
    assert resumed.records[: len(finished_before)] == finished_before
    undisturbed, disturbed = killed.outcome(search.folder), killed.outcome(folder)
    assert disturbed == undisturbed
    assert killed.starts_behind(folder) == []


@pytest.mark.parametrize("is_repeated", [False, True], ids=["in order", "at once"])
def test_a_search_that_is_ended_while_ray_starts_leaves_nothing_behind(
    is_repeated: bool, workplace: Path, no_ray_left: None
) -> None:
    before = ray_processes()
    process = start_program("run_search.py", *SPACE, *SMALL, "--name", "early", cwd=workplace)
    assert wait_until(lambda: bool(ray_processes() - before), seconds=60)
    process.send_signal(signal.SIGTERM)
    if is_repeated:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(timeout=120)
    seconds = time.monotonic() - began
    finished = finish(process, workplace / "results" / "early")
    assert (finished.code, finished.output[-13:]) == (130, "\ninterrupted\n")
    assert "Traceback" not in finished.output
    if is_repeated:
        assert seconds < 5, "in order it takes longer"
        shutil.rmtree(finished.folder)
    assert not finished.folder.exists()


def interrupted_on_a_terminal(terminal: Terminal) -> list[str]:
    """Start the search, look at it at two sizes and type Ctrl-C; return the arguments to go on."""
    program = [sys.executable, str(REPOSITORY / "run_search.py")]
    arguments = [*SPACE, *SMALL, "--concurrency", "1", "--name", "disturbed"]
    terminal.type(f"clear; {shlex.join([*program, *arguments])}; echo ended with $?", "Enter")
    assert wait_until(lambda: ended_trials(terminal.lines()) != [], seconds=120), terminal.text()
    assert terminal.shows("digits: trials of "), terminal.text()
    # What wraps is drawn again and again; what is just being drawn is whole in a moment.
    assert wait_until(lambda: live_part_is_whole(terminal.lines(), 80), seconds=5), terminal.text()
    assert not terminal.cursor_is_visible()

    terminal.resize(200, 50)
    assert wait_until(
        lambda: any(len(line) > 80 for line in ended_trials(terminal.lines())), seconds=120
    ), terminal.text()

    terminal.type("C-c")
    assert wait_until(lambda: terminal.shows("ended with 130"), seconds=60), terminal.text()
    shown = [line for line in terminal.lines("-J") if line.strip() and "$ " not in line]
    *_, resume, ended = shown
    assert ended.startswith("ended with 130")
    words = shlex.split(resume)
    assert words == [*program, *arguments, "--resume"]
    assert not terminal.shows("Traceback")
    assert not terminal.shows("running ")
    assert terminal.cursor_is_visible()
    return words[2:]


def ended_trials(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match(r"trial \d+ +(stopped|completed|paused) ", line)]


def live_part_is_whole(lines: list[str], width: int) -> bool:
    """Return whether each part of it stands once, and no line went over two."""
    once = ("running ", "no trial has run in full", "best: ")
    counts = [sum(line.startswith(beginning) for line in lines) for beginning in once]
    ended = ended_trials(lines)
    return (
        max(counts) == counts[0] == 1
        and sum(" of 6 trials " in line for line in lines) == 1
        and ended != []
        and all(len(line) <= width for line in ended)
        and not any(re.search(r"\S=\S", line) for line in lines if line not in ended)
    )
