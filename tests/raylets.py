"""A Ray cluster of several nodes on this machine, which lose what real nodes lose.

Each node is what `ray start` starts: a raylet with logical CPUs of its own, at a loopback address
of its own (127.1.0.1, the head, then 127.1.0.2, ...), in a session of the operating system of its
own. So a node's processes can be told from those of others, and be lost together. Programs join
with `--address`; the cluster asks for its token, which `Raylets.environment` names.

    with Raylets(num_cpus=0) as cluster:                  # the head has the driver's actors
        first, second = cluster.add_node(), cluster.add_node()
        command = (sys.executable, "run_search.py", "--address", cluster.address)
        search = start_command(*command, cwd=folder, **cluster.environment)
        first.kill()
"""

import contextlib
import secrets
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.processes import output_of, session_processes, start_command, wait_until

WORKER = "RayTrainWorker"
BROKER = "Broker"

# Worker nodes share a machine here, so that none may take its usual ports.
_OPTIONS = (
    *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
    *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"),
    *("--include-log-monitor=false", f"--object-store-memory={100 * 2**20}"),
)


@dataclass(frozen=True)
class Node:
    """A node that has been started, and may be lost by now."""

    address: str
    """By which Ray knows it, and which no other node of the cluster ever has."""
    num_cpus: int
    session: int
    """Session of the operating system, which all of its processes stay in."""

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Return its processes whose title has this part, such as WORKER; all if it is empty."""
        found = session_processes(self.session)
        return [p for p in found if title in "".join(p.info["cmdline"] or [])]

    def is_alive(self) -> bool:
        return self.processes("/raylet/raylet") != []

    def kill(self) -> None:
        """Kill the raylet and all that it has started, as when the machine loses its power."""
        self._signal(signal.SIGKILL)
        assert wait_until(self._has_ended, seconds=20), self.processes()

    def stop(self) -> None:
        """Stop its processes (SIGSTOP): nothing on it answers, but no connection is closed."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let its processes go on after `stop`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        # The raylet first: what others lose is then nothing that it could tell of.
        for process in [*self.processes("/raylet/raylet"), *self.processes()]:
            send(process, number)

    def _has_ended(self) -> bool:
        self._signal(signal.SIGKILL)  # what began meanwhile
        return self.processes() == []


class Raylets:
    """A cluster that ends with the context, without leaving a process or a file behind."""

    def __init__(self, num_cpus: int = 0, *options: str, **environment: str) -> None:
        """Start the head.

        Args:
            num_cpus: of the head; 0 has all trials run on other nodes.
            options: of `ray start`, such as `--include-dashboard=true`; the last one counts.
            environment: of all nodes.
        """
        self.nodes: list[Node] = []
        """All that were started, lost ones too; the head is the first."""
        self.folder = Path(tempfile.mkdtemp(prefix="rays-"))  # of sockets, whose paths are short
        token = self.folder / "auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",  # a program that names an address has none by default
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        """What programs need in their environment to be let in, and to find it as `auto`."""
        self._environment = {**environment, **self.environment}
        try:
            head = ("--head", "--port=0", "--include-dashboard=false")
            self._start(num_cpus, *head, *options)
        except BaseException:
            self.end()
            raise
        self.address = (self.folder / "ray" / "ray_current_cluster").read_text()
        """HOST:PORT, for `--address`."""

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def __enter__(self) -> "Raylets":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def add_node(self, num_cpus: int = 1, *options: str, prefix: tuple[str, ...] = ()) -> Node:
        """Start a node that joins the cluster.

        Args:
            num_cpus: logical ones; the machine may have fewer.
            options: of `ray start`; the last one counts.
            prefix: of the command, such as `("unshare", "-m")`, which gives it a place of its own.
        """
        return self._start(num_cpus, f"--address={self.address}", *options, prefix=prefix)

    def live_nodes(self) -> list[Node]:
        return [node for node in self.nodes if node.is_alive()]

    def processes(self, title: str) -> list[tuple[Node, psutil.Process]]:
        """Return the processes of all nodes whose title has this part, each with its node."""
        return [(node, process) for node in self.nodes for process in node.processes(title)]

    def end(self) -> None:
        """Kill all nodes, the last one first, and remove their files."""
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, num_cpus: int, *options: str, prefix: tuple[str, ...] = ()) -> Node:
        ray = str(Path(sys.executable).with_name("ray"))
        address = f"127.1.0.{len(self.nodes) + 1}"
        own = (f"--num-cpus={num_cpus}", f"--node-ip-address={address}")
        command = (*prefix, ray, "start", *_OPTIONS, *own, *options)
        started = start_command(*command, cwd=self.folder, **self._environment)
        node = Node(address, num_cpus, session=started.pid)
        self.nodes.append(node)
        said = output_of(started)
        assert started.returncode == 0, said
        return node


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process, unless it has ended; never to another one of its id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
