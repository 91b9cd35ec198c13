"""Writes down what happens in a run, and then tells those who watch it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.gauges import Gauges
from nanovlm.cluster.logs import DRIVER_LOG
from nanovlm.cluster.ray_cluster import AuthTokenGuard
from nanovlm.cluster.worker_pool import INTERRUPTED
from nanovlm.config.sources import config_values
from nanovlm.config.yaml_text import write_yaml
from nanovlm.errors import RunFailed
from nanovlm.messages import Notice, ProgressUpdate, TrialRecord
from nanovlm.results.read import CONFIG_FILE, DATA_FILE, LOGS_DIR, SPACE_FILE
from nanovlm.results.write import ResultsStore
from nanovlm.watch.observer import Observer, RunStart
from nanovlm.watch.report.page import ReportWriter
from nanovlm.watch.tensorboard import TensorBoardLogs
from nanovlm.watch.wandb_runs import WandbRuns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """What a search or a single run has come to."""

    folder: Path
    """The results folder; `nanovlm.results.load.load_results` reads it."""
    summary: Mapping[str, Any]
    """The content of `summary.json`."""
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked for, and why."""

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM ended it, so that it can go on."""
        return bool(self.summary["ended_by"] == INTERRUPTED)

    @property
    def has_failed(self) -> bool:
        """Whether there were trials, and all of them failed."""
        trials = self.summary["trials"]
        return bool(0 < trials["total"] == trials["failed"])


class Recorder:
    """Between a run and its results folder; what it is told goes to the observers too.

    An observer hears of what has ended or paused only when it is on disk, and if it fails, neither
    the run nor the folder nor another observer has to suffer.
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
        self._has_begun = False

    def begin(self, dashboard_url: str | None, is_own_cluster: bool, concurrency: int) -> None:
        """The cluster is there. Once more, for the runs that confirm, it changes nothing."""
        if self._has_begun:
            return
        self._has_begun = True
        start = self._start
        if start.space is not None:
            self._store.begin()
            self._store.write_text(SPACE_FILE, start.space.to_yaml())
        else:
            config = write_yaml(config_values(start.config))
            self._store.write_text(CONFIG_FILE, config)
        self._store.write_json(DATA_FILE, start.data)
        start = replace(
            start,
            dashboard_url=dashboard_url,
            is_own_cluster=is_own_cluster,
            concurrency=concurrency,
        )
        self._audience.tell(lambda observer: observer.begin(start))

    @property
    def has_begun(self) -> bool:
        """Whether something ran, of which the observers were told."""
        return self._has_begun

    def take(self, event: Event) -> None:
        """Take in what has happened."""
        if isinstance(event, Notice):
            logger.warning(event.text)
            self._audience.notice(event.text)
        elif isinstance(event, ProgressUpdate):
            self._audience.tell(lambda observer: observer.progress(event))
        else:
            self._take_record(event)
        self._audience.tell_problems()

    def _take_record(self, event: TrialRecord) -> None:
        if event.reports:
            self._store.begin()  # from now on there is something to lose
        if event.end is not None:
            self._store.begin()
            self._store.add(event)
        else:
            self._store.note_pause(event)
        self._store.write_summary(time.monotonic() - self._started)
        self._audience.tell(lambda observer: observer.trial_changed(event))

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Let the folder and the observers know why it is over if an error ends the context."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RunFailed):
                error.folder = self._store.folder
            if self._store.has_begun:
                known = isinstance(error, RunFailed)
                try:
                    self.end(str(error) if known else f"an error: {error}", is_settled=False)
                except OSError:  # the disk may be what has failed before
                    logger.exception("the end could not be written down")
            raise

    def end(self, ended_by: str, is_settled: bool = True) -> Mapping[str, Any]:
        """Close the results folder; return the content of `summary.json`.

        Args:
            is_settled: whether what the confirming runs come to decides what is best.
        """
        summary = self._store.close(time.monotonic() - self._started, ended_by, is_settled)
        if self._has_begun:
            self._audience.tell(lambda observer: observer.end(summary))
        return summary

    def notes(self) -> list[str]:
        """Return what the observers have to say at the end, and which of them have failed."""
        return self._audience.notes()


logger = logging.getLogger(__name__)


def standard_observers() -> list[Observer]:
    """Return the observers of a run. W&B's does nothing unless the run's configuration wants it."""
    return [ReportWriter(), TensorBoardLogs(), WandbRuns(), Gauges(), AuthTokenGuard()]


class Audience:
    """Tells observers one after another. One that fails hears nothing more; the others do."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._listening = list(observers)
        self._failures: list[str] = []
        self._told = set[str]()
        self._lock = threading.Lock()  # some is told by the thread that takes in what happens

    def tell(self, what: Callable[[Observer], object]) -> None:
        """Call `what` with each observer that has not failed."""
        with self._lock:
            for observer in list(self._listening):
                try:
                    what(observer)
                except (Exception, SystemExit) as error:  # rich exits when its output is closed
                    self._drop(observer, error)

    def tell_problems(self) -> None:
        """Tell what has gone wrong with an observer, each problem once."""
        problems = list(self._failures)
        self.tell(lambda observer: problems.extend(filter(None, [observer.problem])))
        for text in problems:
            if text not in self._told:
                self._told.add(text)
                self.notice(text)

    def notice(self, text: str) -> None:
        """Tell what a person should know."""
        self.tell(lambda observer: observer.notice(text))

    def notes(self) -> list[str]:
        """Return what a person is to be told at the end: the observers' notes, and who failed."""
        notes: list[str] = []
        self.tell(lambda observer: notes.extend(observer.notes))
        return notes + self._failures

    def _drop(self, observer: Observer, error: BaseException) -> None:
        self._listening.remove(observer)
        name = type(observer).__name__
        logger.error("%s has failed", name, exc_info=error)
        self._failures.append(
            f"{name} has failed, and was told nothing after: {type(error).__name__}: {error} "
            f"(see {LOGS_DIR}/{DRIVER_LOG})"
        )
