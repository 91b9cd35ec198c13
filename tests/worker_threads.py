"""Worker groups as threads of the test's process: real trials and reports, no process to start."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from nanovlm.cluster.worker import RunTrial, WorkerSettings, serve_broker
from nanovlm.cluster.worker_group import ClusterSetup
from nanovlm.cluster.worker_groups import DESERTED, WorkerGroups
from nanovlm.errors import RunFailed


class ThreadPool:
    """Serves the trials of each slot on the CPU until the broker closes."""

    def __init__(self, broker: Any, log_dir: Path, run_trial: RunTrial) -> None:
        self.error: Exception | None = None
        self._broker, self._log_dir, self._run_trial = broker, log_dir, run_trial
        self._threads: list[threading.Thread] = []

    def start(self, num_groups: int) -> None:
        for _ in range(num_groups):
            name = f"group-{len(self._threads)}"
            settings = WorkerSettings(name, self._broker, str(self._log_dir), self._run_trial)
            thread = threading.Thread(target=self._serve, args=(settings,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def num_slots(self) -> int:
        return max(1, sum(thread.is_alive() for thread in self._threads))

    def follow_cluster(self) -> None:
        if self._threads and not any(thread.is_alive() for thread in self._threads):
            raise RunFailed(f"{DESERTED}: {self.error}")

    def end_groups(self, names: Sequence[str]) -> None:
        """Put others in their places; the threads end when they ask for their next jobs."""
        self.start(len(names))

    def leave(self) -> None:
        ray.get(self._broker.close.remote())
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), f"{thread.name} has not gone home"

    def _serve(self, settings: WorkerSettings) -> None:
        try:
            serve_broker(settings, torch.device("cpu"))
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def worker_threads(
    num_groups: int, most: int | None, broker: Any, setup: ClusterSetup, run_trial: RunTrial
) -> Iterator[WorkerGroups]:
    """Do what `nanovlm.cluster.worker_group.worker_groups` does, in threads."""
    pool = ThreadPool(broker, setup.log_dir, run_trial)
    pool.start(num_groups)
    yield pool
    pool.leave()
