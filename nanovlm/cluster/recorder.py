"""Records the events of a run in its results folder, then passes them to the observers."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovlm import process
from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.gauges import Gauges
from nanovlm.cluster.logs import DRIVER_LOG
from nanovlm.cluster.ray_cluster import AuthTokenGuard, Cluster
from nanovlm.cluster.worker_pool import INTERRUPTED
from nanovlm.config.sources import config_values
from nanovlm.config.yaml_text import write_yaml
from nanovlm.errors import RunFailed
from nanovlm.messages import Notice, ProgressUpdate, TrialRecord
from nanovlm.results.read import CONFIG_FILE, DATA_FILE, LOGS_DIR, SPACE_FILE
from nanovlm.results.write import ResultsStore
from nanovlm.watch.observer import Observer, RunStart
from nanovlm.watch.report.writer import ReportWriter
from nanovlm.watch.tensorboard import TensorBoardLogs
from nanovlm.watch.wandb_runs import WandbRuns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a search or a single run."""

    folder: Path
    """The results folder; `nanovlm.results.load.load_results` reads it."""
    summary: Mapping[str, Any]
    """The content of `summary.json`."""
    notes: tuple[str, ...] = ()
    """What was done differently from what was asked for, and why."""

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM ended it, so that it can be resumed."""
        return bool(self.summary["ended_by"] == INTERRUPTED)

    @property
    def has_failed(self) -> bool:
        """Whether there were trials, and all of them failed."""
        trials = self.summary["trials"]
        return bool(0 < trials["total"] == trials["failed"])


class Recorder:
    """Writes events to the results folder and then passes them to the observers.

    Observers get a trial that has ended or paused only when it is on disk. An observer that fails
    affects neither the run nor the folder nor the other observers.
    """

    def __init__(
        self, store: ResultsStore, start: RunStart, observers: Sequence[Observer] = ()
    ) -> None:
        """
        Args:
            store: opened.
            start: what is known before the cluster is there.
        """
        self._store = store
        self._start = start
        self._audience = Audience(observers)
        self._started = time.monotonic() - start.earlier_seconds
        self.has_begun = False
        """Whether the cluster was there and the observers have begun."""

    def begin(self, cluster: Cluster, concurrency: int) -> None:
        """The cluster is there. A second call, for the confirming runs, changes nothing."""
        if self.has_begun:
            return
        self.has_begun = True
        start = self._start
        if start.space is not None:
            self._store.begin()
            self._store.write_text(SPACE_FILE, start.space.to_yaml())
        else:
            self._store.write_text(CONFIG_FILE, write_yaml(config_values(start.config)))
        self._store.write_json(DATA_FILE, start.data)
        start = replace(
            start,
            cluster=cluster.description,
            dashboard_url=cluster.dashboard_url,
            is_own_cluster=cluster.is_own,
            concurrency=concurrency,
        )
        self._audience.call(lambda observer: observer.begin(start))

    def take(self, events: Sequence[Event]) -> None:
        """Record events, all of them at once, and pass them on."""
        records = [event for event in events if isinstance(event, TrialRecord)]
        if records:
            self._record(records)
        for event in events:
            self._pass_on(event)
        self._audience.report_problems()

    def _record(self, records: Sequence[TrialRecord]) -> None:
        if any(record.reports or record.end is not None for record in records):
            self._store.begin()  # from now on there is something to lose
        self._store.take(*records)
        self._store.write_summary(time.monotonic() - self._started)

    def _pass_on(self, event: Event) -> None:
        if isinstance(event, Notice):
            logger.warning(event.text)
            self._audience.call(lambda observer: observer.notice(event.text))
        elif isinstance(event, ProgressUpdate):
            self._audience.call(lambda observer: observer.progress(event))
        else:
            self._audience.call(lambda observer: observer.trial_changed(event))

    @contextlib.contextmanager
    def errors_recorded(self) -> Iterator[None]:
        """If an error ends the context, pass the reason to the folder and the observers."""
        try:
            with process.on_abandon(self._record_error):
                yield
        except Exception as error:
            self._record_error(error)
            raise

    def _record_error(self, error: Exception) -> None:
        is_known = isinstance(error, RunFailed)
        if isinstance(error, RunFailed):
            error.folder = self._store.folder
        if self._store.has_begun:
            try:
                self.end(str(error) if is_known else f"an error: {error}", is_settled=False)
            except OSError:  # the disk may be what has failed before
                logger.exception("the end could not be recorded")

    def end(self, ended_by: str, is_settled: bool = True) -> Mapping[str, Any]:
        """Close the results folder; return the content of `summary.json`.

        Args:
            is_settled: whether the confirming runs decide what is best.
        """
        summary = self._store.close(time.monotonic() - self._started, ended_by, is_settled)
        if self.has_begun:
            self._audience.call(lambda observer: observer.end(summary))
        return summary

    def notes(self) -> list[str]:
        """Return the observers' notes for the end of the run, and which of them have failed."""
        return self._audience.notes()


def standard_observers() -> list[Observer]:
    """Return the observers of a run. W&B's does nothing unless the run's configuration wants it."""
    return [ReportWriter(), TensorBoardLogs(), WandbRuns(), Gauges(), AuthTokenGuard()]


class Audience:
    """Calls observers one after another. One that fails is called no more; the others are."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)
        self._failures: list[str] = []
        self._reported = set[str]()
        self._lock = threading.Lock()  # the thread of events and the main thread call

    def call(self, method: Callable[[Observer], object]) -> None:
        """Call `method` with each observer that has not failed."""
        with self._lock:
            for observer in list(self._observers):
                try:
                    method(observer)
                except (Exception, SystemExit) as error:  # rich exits when its output is closed
                    self._drop(observer, error)

    def report_problems(self) -> None:
        """Send a notice of each observer's problem or failure, once."""
        problems = list(self._failures)
        self.call(lambda observer: problems.extend(filter(None, [observer.problem])))
        for text in problems:
            if text not in self._reported:
                self._reported.add(text)
                self.call(lambda observer: observer.notice(text))  # noqa: B023

    def notes(self) -> list[str]:
        notes: list[str] = []
        self.call(lambda observer: notes.extend(observer.notes))
        return notes + self._failures

    def _drop(self, observer: Observer, error: BaseException) -> None:
        self._observers.remove(observer)
        name = type(observer).__name__
        logger.error("%s has failed", name, exc_info=error)
        self._failures.append(
            f"{name} has failed, and gets no more events: {type(error).__name__}: {error} "
            f"(see {LOGS_DIR}/{DRIVER_LOG})"
        )
