"""Who watches every run, whoever started it, and how they are told."""

import logging
import threading
from collections.abc import Callable, Sequence

from nanovlm.distributed.auth_token import AuthTokenGuard
from nanovlm.distributed.driver_log import DRIVER_LOG
from nanovlm.distributed.gauges import Gauges
from nanovlm.observer import Observer
from nanovlm.results.read import LOGS_DIR
from nanovlm.results.report_writer import ReportWriter
from nanovlm.tracking.tensorboard import TensorBoardLogs
from nanovlm.tracking.wandb_runs import WandbRuns

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
