"""Keeps `report.html` up to date while a search or a single run goes on."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanovlm.files import replace_json
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.results.folder import describe_environment
from nanovlm.results.read import ENVIRONMENT_FILE
from nanovlm.watch.observer import Observer, RunStart
from nanovlm.watch.report.page import write_report

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.1
"""Of the time, that may go into writing reports."""

SIGN_OF_LIFE_SECONDS = 60.0
"""While trials run the report is written at least so often, so that a dead search can be told from
one with long trials."""


class ReportWriter(Observer):
    """Writes the report after every change, in a thread of its own.

    The run never waits for it, but at the end, and changes that come while one is written share the
    next. A report that cannot be written does not end the run: it is logged and kept in `problem`.
    """

    def __init__(
        self,
        write: Callable[[Path], object] = write_report,
        *,
        seconds_between: float = 1.0,
        sign_of_life_seconds: float = SIGN_OF_LIFE_SECONDS,
    ) -> None:
        """
        Args:
            write: makes the report of a results folder.
            seconds_between: at least, between the begin of a report and that of the next.
            sign_of_life_seconds: at most, while trials run.
        """
        self._problem: str | None = None
        self._write = write
        self._seconds_between = seconds_between
        self._sign_of_life_seconds = sign_of_life_seconds
        self._is_due = threading.Event()
        self._is_over = threading.Event()
        self._begun_at = time.monotonic()  # the last report
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str | None:
        """Why the last report could not be written; None if it was."""
        return self._problem

    def begin(self, start: RunStart) -> None:
        """Write down what the run goes on, and begin to write reports."""
        self._is_over.clear()
        self._is_due.set()
        self._thread = threading.Thread(
            target=self._work, args=(start.folder,), name="report", daemon=True
        )
        self._thread.start()

    def progress(self, update: ProgressUpdate) -> None:
        """Have a report written if the last one is old."""
        if time.monotonic() - self._begun_at > self._sign_of_life_seconds:
            self._is_due.set()

    def trial_changed(self, record: TrialRecord) -> None:
        """Have a report written."""
        self._is_due.set()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the last report and wait for it."""
        if self._thread is None:
            return  # it is over before it has begun
        self._is_over.set()
        self._is_due.set()
        self._thread.join()
        self._thread = None

    def _work(self, folder: Path) -> None:
        self._try(lambda: replace_json(folder / ENVIRONMENT_FILE, describe_environment()))
        while True:
            self._is_due.wait()
            self._is_due.clear()  # before all else: what is due from now on is for the next round
            is_last = self._is_over.is_set()
            self._begun_at = time.monotonic()
            self._try(lambda: self._write(folder))
            if is_last:
                return
            took = time.monotonic() - self._begun_at
            pause = max(self._seconds_between, took / LARGEST_SHARE) - took
            self._is_over.wait(pause)

    def _try(self, write: Callable[[], object]) -> None:
        """Write; whatever goes wrong with a report must not end the run that it is about."""
        try:
            write()
        except Exception as error:
            self._problem = f"the report could not be written: {type(error).__name__}: {error}"
            logger.exception("the report could not be written")
        else:
            self._problem = None
