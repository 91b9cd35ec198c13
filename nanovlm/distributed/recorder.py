"""Writes down what happens in a run, and then tells those who watch it."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovlm.config_files import config_values
from nanovlm.distributed.session import INTERRUPTED
from nanovlm.messages import Pulse, TrialRecord
from nanovlm.observer import Observer, RunStart
from nanovlm.results.read import CONFIG_FILE, DATA_FILE, SPACE_FILE
from nanovlm.results.store import ResultsStore
from nanovlm.yaml_text import write_yaml


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

    An observer hears of what has ended only when it is on disk.
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
        self._observers = observers
        self._started = time.monotonic() - start.earlier_seconds
        self._has_begun = False

    def begin(self, dashboard_url: str | None, is_own_cluster: bool, num_slots: int) -> None:
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
            num_slots=num_slots,
        )
        for observer in self._observers:
            observer.begin(start)

    def take(self, event: TrialRecord | Pulse) -> None:
        """Take in a change of a trial, or a pulse."""
        if isinstance(event, Pulse):
            for observer in self._observers:
                observer.pulse(event)
            return
        if event.reports:
            self._store.begin()  # from now on there is something to lose
        if event.state != "running":
            self._store.begin()
            self._store.add(event)
        self._store.write_summary(time.monotonic() - self._started)
        for observer in self._observers:
            observer.trial_changed(event)

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Let the folder and the observers know why it is over if an error ends the context."""
        try:
            yield
        except Exception as error:
            if self._store.has_begun:
                self.end(f"an error: {error}", is_settled=False)
            raise

    def end(self, ended_by: str, is_settled: bool = True) -> Mapping[str, Any]:
        """Close the results folder; return the content of `summary.json`.

        Args:
            is_settled: whether what the confirming runs come to decides what is best.
        """
        if is_settled:
            self._store.settle_confirmed()
        summary = self._store.close(time.monotonic() - self._started, ended_by)
        if self._has_begun:
            for observer in self._observers:
                observer.end(summary)
        return summary
