"""What signals do to programs: real processes and real signals, without Ray."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanovlm import process
from nanovlm.__main__ import COMMANDS
from tests.processes import wait_until

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]

PROGRAMS = (
    *("run_search.py", "run_single.py"),
    *(f"nanovlm {command}" for command in COMMANDS),
)

Process = subprocess.Popen[str]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

HEAD = """
import hashlib, signal, subprocess, sys, threading, time
from nanovlm import cli, process
process.listen()
told = threading.Event()

def say(text):
    print(text, flush=True)

def wait_in_c():  # no Python runs in this thread for minutes
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def start(code: str, **options: int) -> Process:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, **given)  # type: ignore[call-overload]


def line_of(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_of(process: Process) -> tuple[int, str]:
    try:
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_has_to_end_in_order_a_signal_ends_all_at_once(number: int) -> None:
    process = start(
        "child = subprocess.Popen(['sh', '-c', 'sleep 100 & wait'])\nsay('here')\nwait_in_c()"
    )
    assert line_of(process) == "here"
    assert wait_until(lambda: len(psutil.Process(process.pid).children(True)) == 2, seconds=10)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert end_of(process) == (130, "\ninterrupted\n")
    assert wait_until(lambda: not any(map(is_alive, started)), seconds=10)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


IN_ORDER = """
def main():
    with process.in_order(told.set):
        say('here')
        told.wait(20)
        say('told')
        {more}
    assert process.was_interrupted()
    return cli.INTERRUPTED
cli.run_program(main)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_ends_in_order(number: int) -> None:
    process = start(IN_ORDER.format(more="say('ended')"))
    line_of(process)
    process.send_signal(number)
    assert end_of(process) == (130, "told\nended\n")


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGHUP, signal.SIGTERM, True),
        (signal.SIGHUP, signal.SIGHUP, False),  # a terminal that closes sends several
    ],
)
def test_a_second_signal_ends_it_at_once(first: int, second: int, ends: bool) -> None:
    wait = "wait_in_c()" if ends else "time.sleep(0.5)"
    process = start(IN_ORDER.format(more=wait))
    line_of(process)
    process.send_signal(first)
    assert line_of(process) == "told"
    time.sleep(0.2)
    process.send_signal(second)
    assert end_of(process) == (130, "\ninterrupted\n" if ends else "")


def test_what_is_sent_twice_at_once_is_one_signal() -> None:
    process = start(IN_ORDER.format(more="time.sleep(0.3); say('ended')"))
    line_of(process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, "told\nended\n")


def test_a_signal_after_the_end_changes_nothing() -> None:
    code = """
class Slow:
    def __del__(self):
        say('torn down')
        time.sleep(0.3)
slow = Slow()  # like the modules of large libraries
raise SystemExit(3)
"""
    process = start(code)
    assert line_of(process) == "torn down"
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (3, "")


def test_an_error_on_the_way_to_the_end_is_told_without_a_traceback() -> None:
    process = start(IN_ORDER.format(more="raise OSError('no disk')"))
    line_of(process)
    process.send_signal(signal.SIGTERM)
    said = "told\n\ninterrupted; and while it ended: OSError: no disk\n"
    assert end_of(process) == (130, said)


def test_a_part_of_the_cluster_that_is_lost_on_the_way_to_the_end_changes_no_code() -> None:
    more = "from nanovlm.errors import RunFailed; raise RunFailed('the channel is lost')"
    process = start(IN_ORDER.format(more=more))
    line_of(process)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (130, "told\nerror: the channel is lost\n")


def test_what_comes_later_is_told_of_a_signal_that_came_before() -> None:
    code = """
with process.in_order():
    say('here')
    while not process.was_interrupted():
        time.sleep(0.01)
    with process.in_order(told.set):
        assert told.is_set()
    say('ended')
"""
    process = start(code)
    line_of(process)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (0, "ended\n")


def test_handlers_are_set_again_after_a_library_has_replaced_them() -> None:
    replaced = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nprocess.renew()\n"
    process = start(replaced + "say('here')\nwait_in_c()")
    line_of(process)
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 130


def test_nohup_keeps_a_program_alive_without_its_terminal() -> None:
    code = HEAD + "say('here')\nsys.stdin.read()\nsay('alive')"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        text=True,
    )
    line_of(process)
    process.send_signal(signal.SIGHUP)
    assert end_of(process) == (0, "alive\n")


def test_printing_to_a_terminal_that_is_closed_does_not_fail(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    file = tmp_path / "wrote"
    more = f"time.sleep(0.2); say('gone'); open({str(file)!r}, 'w').write('ended')"
    process = start(IN_ORDER.format(more=more), stdout=terminal, stderr=terminal)
    os.close(terminal)
    while os.read(controller, 1) != b"\n":
        pass
    assert wait_until(lambda: psutil.Process(process.pid).status() == "sleeping", seconds=10)
    os.close(controller)
    process.send_signal(signal.SIGHUP)
    assert end_of(process)[0] == 130
    assert file.read_text() == "ended"


@pytest.fixture
def slow_imports(tmp_path: Path) -> Path:
    """Return a folder whose `torch` and `pydantic` say so when they are imported, and take long."""
    for name in ("torch", "pydantic"):
        (tmp_path / f"{name}.py").write_text("import time\nprint('imported', flush=True)\n")
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("time.sleep(60)\n")
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_ends_a_program_while_it_imports(program: str, slow_imports: Path) -> None:
    what = [str(REPOSITORY / program)] if program.endswith(".py") else ["-m", *program.split()]
    path = os.pathsep.join([str(slow_imports), str(REPOSITORY)])
    process = subprocess.Popen(
        [sys.executable, *what],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert line_of(process) == "imported"
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (130, "\ninterrupted\n")


def test_a_program_of_somebody_else_keeps_its_handlers_and_is_not_ended() -> None:
    before, told = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(KeyboardInterrupt), process.in_order(lambda: told.append(1)):
        signal.raise_signal(signal.SIGTERM)
        assert told == [1] and process.was_interrupted()
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not process.was_interrupted()
