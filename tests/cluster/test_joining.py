"""Joining a cluster: what is in the way is said within seconds, in one message with what to do."""

import contextlib
import functools
import http.server
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nanovlm.cluster import joining
from nanovlm.cluster.ray_compat import LocalNode
from nanovlm.errors import UserError
from tests.processes import output_of, session_processes, start_command

REPOSITORY = Path(__file__).parents[2]
ELSEWHERE = "127.0.0.2"
"""An address of this machine for which Ray does not look up another one."""


def refusal(address: str) -> str:
    with pytest.raises(UserError) as refused, joining.admission(address):
        pass
    (message,) = refused.value.messages
    return message


@pytest.mark.parametrize("address", ["", "local", "10.0.0.1", "host:port", "host:0", "h:65536"])
def test_what_is_no_address(address: str) -> None:
    message = refusal(address)
    assert message.startswith("--address: must be HOST:PORT, or auto for your cluster on this")
    assert f"got {address!r}; `ray start --head` starts a cluster and prints its" in message


def test_an_address_of_ray_client() -> None:
    message = refusal("ray://10.0.0.1:10001")
    assert "'ray://10.0.0.1:10001' is an address of Ray Client" in message
    assert "give auto, or HOST:PORT as `ray start --head` prints it" in message


def test_a_name_that_nobody_knows() -> None:
    message = refusal("no-such-machine.invalid:6379")
    assert "no machine is known here by the name 'no-such-machine.invalid'" in message
    assert "check its spelling" in message


def test_an_address_where_nothing_listens() -> None:
    message = refusal(f"{ELSEWHERE}:9")
    assert "no Ray cluster answers at '127.0.0.2:9': nothing listens there" in message


def test_an_address_without_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of connections that is full answers as little as a machine behind a firewall."""
    monkeypatch.setattr(joining, "_CONNECT_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server((ELSEWHERE, 0), backlog=0))
        address = full.getsockname()
        with contextlib.suppress(TimeoutError):
            for _ in range(10):
                stack.enter_context(socket.create_connection(address, timeout=0.2))
        message = refusal(f"{address[0]}:{address[1]}")
    assert "timed out. Check the address, and whether a firewall is between" in message


def test_what_listens_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "set_auth_mode", lambda mode: None)  # the shared cluster needs it
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/nonexistent")
    with http.server.ThreadingHTTPServer((ELSEWHERE, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        message = refusal(f"{ELSEWHERE}:{server.server_port}")
        server.shutdown()
    assert "is no Ray cluster (its answer: UNAVAILABLE); give the address that" in message


def test_several_clusters_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [LocalNode(f"10.0.0.{n}:6379", 7) for n in (1, 2, 1)]
    monkeypatch.setattr(joining, "local_nodes", lambda: nodes)
    monkeypatch.setattr("os.getuid", lambda: 7)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(joining, "last_started_cluster", lambda: "10.0.0.9:6379")
    message = refusal("auto")
    assert "found 2 Ray clusters of yours on this machine; give the address of one" in message
    assert message.endswith(": 10.0.0.1:6379, 10.0.0.2:6379")
    monkeypatch.setattr(joining, "last_started_cluster", lambda: "10.0.0.2:6379")
    assert joining._find_own() == "10.0.0.2:6379"


def documented_lines() -> list[str]:
    """Return the lines of docs/cluster.md that start Ray on two machines."""
    text = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Two machines by hand\n(.*?)^## ", text, re.M | re.S)
    return [
        line.strip()
        for line in re.findall(r"^    (.*)$", section, re.M)
        if re.search(r"ray (start|get-auth-token)", line)
    ]


@pytest.fixture(scope="module")
def two_machines() -> Iterator[tuple[str, Path, Path]]:
    """Start Ray as the document says on two "machines": two addresses of this one, with a home
    each. Return the cluster's address and the homes."""
    homes = Path(tempfile.mkdtemp(prefix="rays-", dir="/tmp"))  # of sockets, whose paths are short
    first, second = homes / "first", homes / "second"
    first.mkdir()
    second.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sessions = []

    def run(line: str, home: Path, address: str) -> None:
        options = (
            f"ray start --num-cpus=1 --node-ip-address={address} --disable-usage-stats "
            "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0"
        )
        line = line.replace("ray start", options).replace("6379", str(port))
        line = line.replace("FIRST", "127.1.0.1").replace(
            "--head", "--head --include-dashboard=false"
        )
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        unset = ("env", "-u", "RAY_AUTH_MODE", "-u", "RAY_ADDRESS", "bash", "-c", line)
        environment = {"HOME": str(home), "RAY_TMPDIR": str(home), "PATH": path}
        started = start_command(*unset, cwd=home, **environment)
        sessions.append(started.pid)
        said = output_of(started)
        assert started.returncode == 0, said

    token, head, node = documented_lines()
    try:
        run(token, first, "127.1.0.1")
        run(head, first, "127.1.0.1")
        (second / ".ray").mkdir()
        (second / ".ray" / "auth_token").write_bytes((first / ".ray" / "auth_token").read_bytes())
        run(node, second, "127.1.0.2")
        yield f"127.1.0.1:{port}", first, second
    finally:
        for process in [p for session in reversed(sessions) for p in session_processes(session)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(homes, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_machines_as_documented_and_who_is_let_in(
    two_machines: tuple[str, Path, Path], tmp_path: Path
) -> None:
    address, first, second = two_machines
    command = (sys.executable, "-m", "tests.cluster.joins", address, str(second), str(tmp_path))
    tries = start_command(*command, cwd=REPOSITORY, RAY_TMPDIR=str(first))
    output = output_of(tries, timeout=120)
    assert tries.returncode == 0, output
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    said = {name: text for name, text, _ in lines}
    asks = f"error: --address: the Ray cluster at {address} asks for its token, and"
    here = f"joined Ray cluster at {address} (yours): 2 nodes, 2 CPUs, 0 GPUs"
    starts = {
        "no token": f"{asks} there is none in {tmp_path}/.ray/auth_token; copy ~/.ray/auth_token",
        "wrong token": f"{asks} RAY_AUTH_TOKEN has another one; copy ~/.ray/auth_token from",
        "token is off": f"error: RAY_AUTH_MODE: is disabled, but the Ray cluster at {address} asks",
        "no file": "error: RAY_AUTH_TOKEN_PATH is set but file cannot be opened",
        "RAY_ADDRESS": here,
        "another user's": "error: --address: auto joins your own Ray cluster on this machine, and "
        "there are only those of others: ",
        "another user's by address": f"joined Ray cluster at {address} (of ",
        "not a node": f"error: --address: this machine is no node of the Ray cluster at {address}",
        "none here": "error: --address: auto found no Ray cluster on this machine; `ray start",
        "other Ray": f"error: --address: the Ray cluster at {address} is of another version, and "
        "all machines need the same Python and the same packages (requirements.lock): Version "
        "mismatch: The cluster was started with: Ray: 1.13.0",
        "other Python": f"error: --address: the Ray cluster at {address} is of another version",
        "address": here,
        "auto": here,
    }
    assert said.keys() == starts.keys()
    assert [said[n] for n in starts if not said[n].startswith(starts[n])] == []
    assert f"{address} of " in said["another user's"]
    assert "Give its address to join one all the same: --address " in said["another user's"]
    assert "Python: 3.9.1" in said["other Python"]
    assert max(seconds for name, _, seconds in lines if said[name].startswith("error")) < 30
