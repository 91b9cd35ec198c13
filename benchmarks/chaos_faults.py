"""What `chaos.py` does to a search: it kills, stops and adds parts, drawn from a seed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.postgres import Database
from tests.raylets import WORKER, Node, Raylets, send

REPOSITORY = Path(__file__).parents[1]
MOST_NODES = 4
"""Worker nodes, of one CPU each; the head has none."""


class Program:
    """`run_search.py` in a process of its own, which can be killed and goes on."""

    def __init__(self, cluster: Raylets, folder: Path, name: str, *arguments: str) -> None:
        self.results = folder / "results" / name
        self.output = folder / f"{name}.txt"
        self.began_at = 0.0
        script = str(REPOSITORY / "run_search.py")
        self._command = [sys.executable, script, "--name", name, *arguments]
        self._command += ["--address", cluster.address]
        self._environment = {**os.environ, **cluster.environment}
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Start the search, or go on with it."""
        resume = ["--resume"] if (self.results / "space.yaml").exists() else []
        if not resume:
            shutil.rmtree(self.results, ignore_errors=True)  # nothing has begun
        with self.output.open("a") as output:
            self._process = subprocess.Popen(
                [*self._command, *resume],
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.began_at = time.monotonic()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def code(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._process.poll()


@dataclass
class Faults:
    """Disturbs a search; each kind of fault has a method, and a line that says what it did."""

    cluster: Raylets
    program: Program
    moments: random.Random
    database: Database | None = None
    is_up: bool = False
    """Whether the program has begun a trial since it was started."""
    stopped: list[tuple[Node, psutil.Process]] = field(default_factory=list)
    """Workers that do not answer; nothing but the search itself ends them."""
    _deck: list[str] = field(default_factory=list)

    def workers(self) -> list[Node]:
        """Return the live nodes that run trials."""
        return [node for node in self.cluster.live_nodes() if node is not self.cluster.head]

    def next(self, kinds: Sequence[str]) -> tuple[str, str]:
        """Let the next thing happen that can happen now; return its kind and what was done.

        Every kind comes once before one comes again, in an order drawn from the seed.
        """
        for _ in range(2):
            for kind in list(self._deck):
                if done := FAULTS[kind](self):
                    self._deck.remove(kind)
                    return kind, done
            self._deck = self.moments.sample(list(kinds), len(kinds))
        return "none", "nothing to disturb"

    def kill_worker(self) -> str | None:
        return self._kill(self.answering_workers())

    def kill_node(self) -> str | None:
        """Lose a node for good; at least one is left to run trials."""
        if len(nodes := self.workers()) < 2:
            return None
        node = self.moments.choice(nodes)
        node.kill()
        return f"{node.address} is lost, {len(nodes) - 1} are left"

    def add_node(self) -> str | None:
        if len(nodes := self.workers()) >= MOST_NODES:
            return None
        return f"{self.cluster.add_node().address} is added to {len(nodes)}"

    def stop_worker(self) -> str | None:
        """Stop a worker (SIGSTOP), as if it hung in a collective or on a dead disk."""
        if not (answering := self.answering_workers()):
            return None
        node, process = self.moments.choice(answering)
        send(process, signal.SIGSTOP)
        self.stopped.append((node, process))
        return f"process {process.pid} on {node.address}"

    def restart_database(self) -> str | None:
        if self.database is None:
            return None
        self.database.stop()
        time.sleep(1)
        self.database.start()
        return "away for a second"

    def kill_program(self) -> str | None:
        if not self.is_up:
            return None  # else a slow machine only ever starts it
        self.program.kill()
        self.program.start()
        return "killed and resumed"

    def answering_workers(self) -> list[tuple[Node, psutil.Process]]:
        return [found for found in self._found(WORKER) if found not in self.stopped]

    def _found(self, title: str) -> list[tuple[Node, psutil.Process]]:
        return self.cluster.processes(f"ray::{title}")

    def _kill(self, found: list[tuple[Node, psutil.Process]]) -> str | None:
        if not found:
            return None
        node, process = self.moments.choice(found)
        send(process, signal.SIGKILL)
        return f"process {process.pid} on {node.address}"


FAULTS: dict[str, Callable[[Faults], str | None]] = {
    "worker": Faults.kill_worker,
    "node": Faults.kill_node,
    "add": Faults.add_node,
    "stop": Faults.stop_worker,
    "database": Faults.restart_database,
    "driver": Faults.kill_program,
}
"""By kind; None says that it was not possible."""


def parts_left(cluster: Raylets) -> list[str]:
    """Return what processes of a search there are on the cluster."""
    left: list[Any] = []
    for title in (WORKER, "Broker"):
        left += [f"{title} on {node.address}" for node, _ in cluster.processes(f"ray::{title}")]
    return left
