"""A search on a real terminal: nothing wraps or is left behind, small or large."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs.conftest import REPOSITORY, SPACE, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Terminal:
    """A tmux server of its own, with one window that runs a shell."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux")]
        self.run("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder))
        self.run("set-option", "-g", "window-size", "manual")

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

    def lines(self) -> list[str]:
        """Return what the window shows."""
        return self.run("capture-pane", "-p").splitlines()

    def text(self) -> str:
        return "\n".join(self.lines())

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    def cursor_is_visible(self) -> bool:
        return self.run("display-message", "-p", "#{cursor_flag}").strip() == "1"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    (tmp_path / "space.yaml").write_text(SPACE)
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.run("kill-server")


def assert_live_part_is_whole(lines: list[str], width: int) -> None:
    """Check that each part of it stands once: what wraps is drawn again and again."""
    for beginning in ("running ", "no trial has run in full", "best: "):
        assert sum(line.startswith(beginning) for line in lines) <= 1, "\n".join(lines)
    assert sum(line.startswith("running ") for line in lines) == 1, "\n".join(lines)
    assert sum(" of 60 trials " in line for line in lines) == 1, "\n".join(lines)
    ended = [line for line in lines if re.match(r"trial \d+ +(stopped|completed) ", line)]
    assert ended and all(len(line) <= width for line in ended), "\n".join(lines)
    leftover = [line for line in lines if re.search(r"\S=\S", line) and line not in ended]
    assert leftover == []  # of a line that went over two


def test_a_search_at_two_sizes_and_ctrl_c(terminal: Terminal) -> None:
    program = f"{sys.executable} {REPOSITORY / 'run_search.py'}"
    command = f"{program} --space space.yaml --trials 60 --concurrency 1"
    terminal.type(f"clear; {command}; echo ended with $?", "Enter")
    assert wait_until(lambda: terminal.shows("trial 1  "), seconds=120), terminal.text()
    assert any(line.startswith("space: trials of ") for line in terminal.lines())
    assert_live_part_is_whole(terminal.lines(), 80)
    assert not terminal.cursor_is_visible()

    terminal.resize(200, 50)
    assert wait_until(lambda: terminal.shows("trial 3  "), seconds=120), terminal.text()
    assert wait_until(
        lambda: any("samples/s, data" in line and len(line) > 80 for line in terminal.lines()), 60
    ), terminal.text()

    terminal.type("C-c")
    assert wait_until(lambda: terminal.shows("ended with 130"), seconds=60), "\n".join(
        terminal.lines()
    )
    *_, resume, ended = [line for line in terminal.lines() if line.strip() and "$ " not in line]
    assert ended.startswith("ended with 130")
    words = shlex.split(resume)
    assert words[:2] == ["python", "run_search.py"]
    assert words[-3:] == ["--name", "space", "--resume"]
    assert not terminal.shows("Traceback")
    assert not terminal.shows("running ")
    assert terminal.cursor_is_visible()
