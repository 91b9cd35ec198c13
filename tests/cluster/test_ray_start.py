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
        ("TMPDIR", "/tmp/" + 85 * "x", "TMPDIR: Ray makes sockets in /tmp/xxx"),
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
        start_ray(None)
    assert message in str(refused.value) and "RAY_TMPDIR=" in str(refused.value)


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
        start_ray(None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("Attempting to cap object store memory usage at 5 bytes, but the minimum"),
            "minimum; make /dev/shm larger (docker run --shm-size=4g), or free memory",
        ),
        (PermissionError(13, "Permission denied", "/tmp/ray/x"), "RAY_TMPDIR=FOLDER has Ray use"),
        (Exception("\nThe last 20 lines of dashboard.log:\nmore"), "The last 20 lines of dashboar"),
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


def test_a_cluster_of_another_version() -> None:
    mismatch = "Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9"
    message = ray_cluster._explain_join("10.0.0.1:6379", RuntimeError(mismatch))
    assert message == (
        "--address: the Ray cluster at '10.0.0.1:6379' is of another version, and all machines "
        "need the same packages: Version mismatch: The cluster was started with: Ray: 2.1 "
        "Python: 3.9"
    )


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
