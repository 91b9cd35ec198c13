"""Worker groups as threads of the test's process: real trials and reports, no process to start."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from nanovlm.distributed.worker import RunTrial, WorkerSettings, serve_channel
from nanovlm.search.sections import TrialResources


class WorkerThread(threading.Thread):
    """Serves the trials of one slot on the CPU until the channel closes."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(name=settings.group, daemon=True)
        self.error: Exception | None = None
        self._settings = settings
        self.start()

    def run(self) -> None:
        try:
            serve_channel(self._settings, torch.device("cpu"))
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def worker_threads(
    num_groups: int,
    channel: Any,
    resources: TrialResources,
    log_dir: Path,
    is_own_cluster: bool,
    run_trial: RunTrial,
) -> Iterator[tuple[WorkerThread, ...]]:
    """Do what `nanovlm.distributed.worker_group.worker_groups` does, in threads."""
    threads = tuple(
        WorkerThread(WorkerSettings(f"group-{i}", channel, str(log_dir), run_trial))
        for i in range(num_groups)
    )
    yield threads
    ray.get(channel.close.remote())
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), f"{thread.name} has not gone home"
