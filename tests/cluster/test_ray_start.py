"""Why Ray cannot start, in one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm.cluster import ray_cluster
from nanovlm.cluster.ray_cluster import address_of_environment, start_ray
from nanovlm.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("variable", "folder", "message"),
    [
        ("TMPDIR", "/tmp/" + 60 * "x", "RAY_TMPDIR=/tmp gives Ray a shorter one"),
        ("RAY_TMPDIR", "/tmp/" + 30 * "ü", "RAY_TMPDIR=/tmp gives Ray a shorter one"),
        ("RAY_TMPDIR", "/dev/null/x", "TMPDIR: Ray cannot use /dev/null/x/ray: Not a directory; "),
        ("RAY_TMPDIR", "/proc/x", "TMPDIR: Ray cannot use /proc/x/ray: No such file or directory"),
    ],
)
def test_a_folder_that_ray_cannot_use(
    variable: str, folder: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    with pytest.raises(UserError) as refused:
        start_ray()
    assert message in str(refused.value) and "RAY_TMPDIR=" in str(refused.value)


def test_a_folder_that_python_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's dashboard starts its parts through Python's forkserver, whose sockets are there."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    room = ray_cluster._LONGEST_SOCKET - len(f"/{ray_cluster._PYTHONS_SOCKET}")
    folder = tmp_path / ((room + 1 - len(f"{tmp_path}/")) * "x")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(UserError, match=f"must not exceed {room} bytes, got {room + 1}; TMPDIR=/"):
        start_ray()
    longest = str(folder)[:-1]
    os.mkdir(longest)
    assert forkserver_starts(longest) and not forkserver_starts(str(folder))


def forkserver_starts(folder: str) -> bool:
    code = "from multiprocessing import forkserver; forkserver.ensure_running()"
    environment = {**os.environ, "TMPDIR": folder}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 or b"AF_UNIX path too long" in done.stderr
    return done.returncode == 0


def test_the_longest_folder_is_the_longest_that_ray_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray._private.utils import validate_socket_filepath

    room = ray_cluster._LONGEST_SOCKET - len("/" + ray_cluster._SOCKET.format(pid=os.getpid()))
    longest = "/" + (room - 1) * "x"
    validate_socket_filepath(f"{longest}/{ray_cluster._SOCKET.format(pid=os.getpid())}")
    with pytest.raises(OSError, match="AF_UNIX path length"):
        validate_socket_filepath(f"{longest}x/{ray_cluster._SOCKET.format(pid=os.getpid())}")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray_cluster, "_FREE_BYTES", 10**18)
    with pytest.raises(UserError, match=r"needs 1000000000000 MB for its logs in /tmp/ray, where"):
        start_ray()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("Attempting to cap object store memory usage at 5 bytes, but the minimum"),
            "minimum; make /dev/shm larger (docker run --shm-size=4g), or free memory",
        ),
        (PermissionError(13, "Permission denied", "/tmp/ray/x"), "RAY_TMPDIR=FOLDER has Ray use"),
        (
            Exception("\nThe last 20 lines of dashboard.log:\nat 5\nOSError: no\n"),
            "OSError: no; Ray",
        ),
        (RuntimeError(""), "Ray cannot be started: RuntimeError; Ray's logs are in /tmp"),
    ],
)
def test_what_ray_raises_is_told_with_what_helps(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    message = ray_cluster._explain(error)
    assert message.startswith("Ray cannot be started: ") and said in message
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.ray
def test_a_start_that_fails_ends_with_one_message_and_leaves_nothing() -> None:
    code = (
        "from nanovlm import cli\nfrom nanovlm.cluster.ray_cluster import connect\n"
        "cli.run_program(lambda: connect(None).__enter__())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "1000"},
        cwd=REPOSITORY,
        capture_output=True,  # returns only when nobody holds the pipes any more
        text=True,
        timeout=50,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Ray cannot be started: ") and "--shm-size" in last


def test_the_cluster_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of_environment() is None
    for given, address in (("", None), ("local", None), ("auto", "auto"), ("h:6379", "h:6379")):
        monkeypatch.setenv("RAY_ADDRESS", given)
        assert address_of_environment() == address
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UserError, match=r"RAY_ADDRESS: must be HOST:PORT .* got 'http"):
        address_of_environment()
