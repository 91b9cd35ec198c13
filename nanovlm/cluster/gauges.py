"""Gauges of a run on Ray's Prometheus endpoint, where Ray puts `ray_` before their names.

Ray forgets a value some 20 s after it was set. So what is to stay is set again every few seconds,
and what is over goes by itself: a search of many hundred trials shows those that run, the best
value and the counts.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge

from nanovlm.files import identifier
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.watch.observer import Observer, RunStart

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0

TRIAL_ACCURACY = "nanovlm_trial_accuracy"
BEST_ACCURACY = "nanovlm_best_accuracy"
SAMPLES_PER_SECOND = "nanovlm_samples_per_second"
DATA_WAIT_FRACTION = "nanovlm_data_wait_fraction"
TRIALS = "nanovlm_trials"

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    TRIAL_ACCURACY: ("The objective at a running trial's last report.", ("search", "trial")),
    BEST_ACCURACY: ("The best objective of a trial that ran its full budget.", ("search",)),
    SAMPLES_PER_SECOND: ("Of a running trial, all its workers together.", ("search", "trial")),
    DATA_WAIT_FRACTION: (
        "Share of the time in which a running trial waits for data.",
        ("search", "trial"),
    ),
    TRIALS: ("Trials by state: running, paused, completed, stopped, failed.", ("search", "state")),
}
"""What each gauge tells, and its tags."""

_STATES = ("running", "paused", "completed", "stopped", "failed")

_Key = tuple[str, str]
"""Name of a gauge, and the value of its second tag."""


class Gauges(Observer):
    """Sets the gauges in a thread; nothing is sent before Ray's own process on the node asks."""

    def __init__(self, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._problem: str | None = None
        self._refresh_seconds = refresh_seconds
        self._values: dict[_Key, float] = {}
        self._counted: dict[str, str] = {}  # trial -> its state
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="gauges", daemon=True)

    @property
    def problem(self) -> str | None:
        return self._problem

    def begin(self, start: RunStart) -> None:
        self._search = identifier(start.folder.name)
        self._metric, self._sign = start.objective.metric, 1.0
        if start.objective.mode == "min":
            self._sign = -1.0
        for record in start.records:
            self._count(record)
        self._thread.start()

    def progress(self, update: ProgressUpdate) -> None:
        if update.stage == "training":
            self._set(SAMPLES_PER_SECOND, update.trial_id, update.samples_per_second)
            self._set(DATA_WAIT_FRACTION, update.trial_id, update.data_wait_fraction)

    def trial_changed(self, record: TrialRecord) -> None:
        if not record.confirms:
            self._count(record)
        if record.state != "running":  # one that is paused is shown again when it goes on
            self._forget(record.trial_id)
        elif record.reports:
            self._show_report(record)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    # ------------------------------------------------------------------ values

    def _show_report(self, record: TrialRecord) -> None:
        if self._metric in record.metrics:
            self._set(TRIAL_ACCURACY, record.trial_id, record.metrics[self._metric])
        speed = record.reports[-1].speed
        if speed is not None:
            self._set(SAMPLES_PER_SECOND, record.trial_id, speed.samples_per_second)
            self._set(DATA_WAIT_FRACTION, record.trial_id, speed.data_wait_fraction)

    def _count(self, record: TrialRecord) -> None:
        self._counted[record.trial_id] = record.state
        counts = list(self._counted.values())
        for state in _STATES:
            self._set(TRIALS, state, counts.count(state))
        if record.state == "completed" and self._metric in record.metrics:
            value = record.metrics[self._metric]
            best = self._values.get((BEST_ACCURACY, ""))
            if best is None or self._sign * value > self._sign * best:
                self._set(BEST_ACCURACY, "", value)

    def _set(self, name: str, tag: str, value: float) -> None:
        with self._lock:
            self._values[name, tag] = value

    def _forget(self, trial_id: str) -> None:
        with self._lock:
            for name in (TRIAL_ACCURACY, SAMPLES_PER_SECOND, DATA_WAIT_FRACTION):
                self._values.pop((name, trial_id), None)

    # ------------------------------------------------------------------ the thread

    def _refresh(self) -> None:
        try:
            gauges = {
                name: Gauge(name, description=about, tag_keys=tags)
                for name, (about, tags) in GAUGES.items()
            }
            while not self._ended.wait(self._refresh_seconds):
                if ray.is_initialized():  # not between the two stages of a search
                    self._set_all(gauges)
        except Exception as error:
            # Who looks on must not end what they look at.
            logger.exception("the gauges have failed")
            self._problem = f"the gauges for Prometheus have failed: {error}"

    def _set_all(self, gauges: Mapping[str, Gauge]) -> None:
        with self._lock:
            values = dict(self._values)
        for (name, tag), value in values.items():
            tags = dict(zip(GAUGES[name][1], (self._search, tag), strict=False))
            gauges[name].set(value, tags=tags)
