"""Gauges of a run on Ray's Prometheus endpoint, where Ray puts `ray_` before their names.

Ray drops a value some 20 s after it was set. So current values are set again every few seconds, and
those of trials that have ended vanish by themselves.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import ray
from ray.util.metrics import Gauge

from nanovlm.files import identifier
from nanovlm.messages import ProgressUpdate, Speed, TrialRecord, TrialState
from nanovlm.watch.observer import Observer, RunStart

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0

TRIAL_ACCURACY = "nanovlm_trial_accuracy"
BEST_ACCURACY = "nanovlm_best_accuracy"
SAMPLES_PER_SECOND = "nanovlm_samples_per_second"
DATA_WAIT_FRACTION = "nanovlm_data_wait_fraction"
TRIALS = "nanovlm_trials"

_OF_TRIAL = ("search", "trial")
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    TRIAL_ACCURACY: ("The objective at a running trial's last report.", _OF_TRIAL),
    BEST_ACCURACY: ("The best objective of a trial that ran its full budget.", ("search",)),
    SAMPLES_PER_SECOND: ("Of a running trial, all its workers together.", _OF_TRIAL),
    DATA_WAIT_FRACTION: ("Share of the time in which a running trial waits for data.", _OF_TRIAL),
    TRIALS: ("Trials by state: running, paused, completed, stopped, failed.", ("search", "state")),
}
"""Description and tags of each gauge."""

_STATES: tuple[TrialState, ...] = get_args(TrialState)


class Gauges(Observer):
    """Sets the gauges in a thread; nothing is sent before Ray's own process on the node asks."""

    def __init__(self, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._problem: str | None = None
        self._refresh_seconds = refresh_seconds
        self._values: dict[tuple[str, str], float] = {}  # gauge and its second tag -> value
        self._states: dict[str, TrialState] = {}  # by trial
        self._counts = Counter[TrialState]()  # of trials
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="gauges", daemon=True)

    @property
    def problem(self) -> str | None:
        return self._problem

    def begin(self, start: RunStart) -> None:
        self._search = identifier(start.folder.name)
        self._objective = start.objective
        for record in start.records:
            self._count(record)
        self._thread.start()

    def progress(self, update: ProgressUpdate) -> None:
        if update.stage == "training":
            self._set_speed(update.trial_id, update)

    def trial_changed(self, record: TrialRecord) -> None:
        if not record.confirms:
            self._count(record)
        if record.state != "running":  # a paused trial is shown again when it goes on
            for name in (TRIAL_ACCURACY, SAMPLES_PER_SECOND, DATA_WAIT_FRACTION):
                self._values.pop((name, record.trial_id), None)
        elif record.reports:
            if self._objective.metric in record.metrics:
                value = record.metrics[self._objective.metric]
                self._values[TRIAL_ACCURACY, record.trial_id] = value
            if speed := record.reports[-1].speed:
                self._set_speed(record.trial_id, speed)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _count(self, record: TrialRecord) -> None:
        if (before := self._states.get(record.trial_id)) is not None:
            self._counts[before] -= 1
        self._states[record.trial_id] = record.state
        self._counts[record.state] += 1
        for state in _STATES:
            self._values[TRIALS, state] = self._counts[state]
        if record.state == "completed" and self._objective.metric in record.metrics:
            value = record.metrics[self._objective.metric]
            best = self._values.get((BEST_ACCURACY, ""))
            if best is None or self._objective.loss(value) < self._objective.loss(best):
                self._values[BEST_ACCURACY, ""] = value

    def _set_speed(self, trial_id: str, speed: ProgressUpdate | Speed) -> None:
        self._values[SAMPLES_PER_SECOND, trial_id] = speed.samples_per_second
        self._values[DATA_WAIT_FRACTION, trial_id] = speed.data_wait_fraction

    def _refresh(self) -> None:
        try:
            gauges = {
                name: Gauge(name, description=about, tag_keys=tags)
                for name, (about, tags) in GAUGES.items()
            }
            while not self._ended.wait(self._refresh_seconds):
                if not ray.is_initialized():  # between the two stages of a search
                    continue
                for (name, tag), value in self._values.copy().items():
                    tags = dict(zip(GAUGES[name][1], (self._search, tag), strict=False))
                    gauges[name].set(value, tags=tags)
        except Exception as error:
            # Monitoring must not end the run.
            logger.exception("the gauges have failed")
            self._problem = f"the gauges for Prometheus have failed: {error}"
