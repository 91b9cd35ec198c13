"""What trackers draw of a trial: its reports and updates, each as numbers at samples seen."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict

from nanovlm.messages import ProgressUpdate, Report


def report_values(report: Report) -> dict[str, float]:
    """Return the numbers of a report: metrics by name, speed as `speed/...`."""
    speed = {} if report.speed is None else asdict(report.speed)
    values = {
        "step": report.step,
        "seconds": report.seconds,
        **report.metrics,
        **{f"speed/{name}": value for name, value in speed.items() if value is not None},
    }
    return {name: float(value) for name, value in values.items()}


def update_values(update: ProgressUpdate) -> dict[str, float]:
    """Return the numbers of a training update, as `live/...`."""
    return {
        "live/train_loss": update.train_loss,
        "live/samples_per_second": update.samples_per_second,
        "live/data_wait_fraction": update.data_wait_fraction,
    }


logger = logging.getLogger(__name__)

MANY_JOBS = 1000
"""So many waiting jobs mean that the tracker cannot keep up."""


class Background:
    """Does jobs one after another, in a thread that starts with the first one."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the tracker, for messages.
        """
        self.problem: str | None = None
        """What went wrong, in a sentence. After it nothing is recorded any more."""
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        if self.problem is None:
            self._jobs.put(job)
            if self._thread.ident is None:
                self._thread.start()

    def is_behind(self) -> bool:
        """Return whether jobs pile up, so that those nobody would miss are better left out."""
        return self._jobs.qsize() > MANY_JOBS

    def close(self, seconds: float) -> None:
        """Wait until all jobs are done, for so many seconds at most."""
        if self._thread.ident is None:
            return
        self._jobs.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.problem = (
                f"{self._name}: not all of the run was recorded in the {seconds:g} s after its end"
            )

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                # A tracker only looks on; the run that it follows is worth more than its record.
                logger.exception("%s has failed", self._name)
                self.problem = f"{self._name} has failed, and recorded nothing after: {error}"
                return
