"""Keeps the report of a run up to date while it goes on."""

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
from nanovlm.watch.report.page_process import PageFailed, PageProcess

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.1
"""Of the time, that may go into writing reports."""

SIGN_OF_LIFE_SECONDS = 60.0
"""While trials run the report is written at least so often, so that a dead search differs from one
with long trials."""

MANY_SLOTS = 16
"""From so many trials at once on, a report of one of them may come at any moment, so pages are made
in another process, which takes 260 MiB. With fewer it would cost more than it saves."""
MANY_TRIALS = 1000
"""The same from so many ended trials on: their page takes half a second."""


class ReportWriter(Observer):
    """Writes the report after every change, in a thread of its own.

    The run never waits for it, but at the end, and changes that come while one is written share the
    next. A report that cannot be written does not end the run: it is logged and kept in `problem`.
    Of a large search all but the last are written by a process of its own.
    """

    def __init__(
        self,
        write: Callable[[Path], object] = write_report,
        *,
        seconds_between: float = 1.0,
        sign_of_life_seconds: float = SIGN_OF_LIFE_SECONDS,
        pages: PageProcess | None = None,
    ) -> None:
        """
        Args:
            write: makes the report of a results folder.
            seconds_between: at least, between the begin of a report and that of the next.
            sign_of_life_seconds: at most, while trials run.
            pages: makes those of a large search; None: a new one.
        """
        self._problem: str | None = None
        self._write = write
        self._pages = pages or PageProcess()
        self._num_slots = 0
        self._ended = set[str]()  # ids of trials
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
        self._num_slots = start.concurrency
        self._ended |= {record.trial_id for record in start.records}
        self._is_due.set()
        self._thread = threading.Thread(target=self._work, args=(start.folder,), daemon=True)
        self._thread.start()

    def progress(self, update: ProgressUpdate) -> None:
        if time.monotonic() - self._begun_at > self._sign_of_life_seconds:
            self._is_due.set()

    def trial_changed(self, record: TrialRecord) -> None:
        if record.end is not None:
            self._ended.add(record.trial_id)
        self._is_due.set()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the last report and wait for it."""
        self._is_over.set()
        self._is_due.set()
        self._pages.interrupt()
        if self._thread is not None:  # else it is over before it has begun
            self._thread.join()

    def _work(self, folder: Path) -> None:
        self._try(lambda: replace_json(folder / ENVIRONMENT_FILE, describe_environment()))
        while True:
            self._is_due.wait()
            self._is_due.clear()  # before all else: what is due from now on is for the next round
            is_last = self._is_over.is_set()
            self._begun_at = time.monotonic()
            if is_last:
                self._pages.close()
            write = self._write if is_last or not self._is_large() else self._pages.write
            self._try(lambda: write(folder))  # noqa: B023
            if is_last:
                return
            took = time.monotonic() - self._begun_at
            self._is_over.wait(max(self._seconds_between, took / LARGEST_SHARE) - took)

    def _is_large(self) -> bool:
        return self._num_slots >= MANY_SLOTS or len(self._ended) >= MANY_TRIALS

    def _try(self, write: Callable[[], object]) -> None:
        """Write; whatever goes wrong with a report must not end the run that it is about."""
        try:
            write()
        except Exception as error:
            kind = "" if isinstance(error, PageFailed) else f"{type(error).__name__}: "
            self._problem = f"the report could not be written: {kind}{error}"
            logger.exception("the report could not be written")
        else:
            self._problem = None
