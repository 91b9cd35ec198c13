"""The base class of what watches a search or a single run: terminal, report, trackers and gauges.

The run knows none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.config.space import SearchSpace
from nanovlm.messages import ProgressUpdate, TrialRecord


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known when the cluster is there and before the first trial begins."""

    folder: Path
    """The results folder; it exists."""
    config: TrainConfig
    """Of a single run, or the base of a search."""
    space: SearchSpace | None = None
    """None for a single run."""
    objective: Objective
    milestones: tuple[int, ...] = ()
    """Samples seen at which trials report before the end."""
    trial_samples: int
    """Samples of the full budget of a trial."""
    data: Mapping[str, Any]
    """The content of `data.json`."""
    description: str = ""
    """What is searched, in a few lines."""
    cluster: str = "own Ray cluster"
    """Which one it is, in words."""
    dashboard_url: str | None = None
    """Of Ray."""
    is_own_cluster: bool = True
    """Whether the cluster was started by this program."""
    concurrency: int = 1
    """How many trials run concurrently."""
    records: Sequence[TrialRecord] = ()
    """Trials that ended before the search was interrupted, in the order of their end."""
    confirmed: Sequence[TrialRecord] = ()
    """Confirming runs that ended before."""
    earlier_seconds: float = 0.0
    """How long the search ran before."""


class Observer:
    """Base class; override the events you need.

    The methods are called one after another, in the thread that writes the results folder too: what
    takes long belongs into a thread of the observer's own. An observer that raises an exception
    gets no further events and is named in the notes of the run's outcome; the run goes on.
    """

    @property
    def problem(self) -> str | None:
        """What went wrong here without ending the run, in a sentence; None if nothing did.

        The other observers get it as a notice.
        """
        return None

    @property
    def notes(self) -> Sequence[str]:
        """What the user reads at the end: the problem, and what else there is to say."""
        return () if self.problem is None else (self.problem,)

    def begin(self, start: RunStart) -> None:
        """The cluster is there; trials are about to begin."""

    def progress(self, update: ProgressUpdate) -> None:
        """A running trial has made progress."""

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial, or a run that confirms one, was submitted, taken up, has reported or has ended.

        One that waits for a free worker group has no `worker_group` yet. What has ended is in the
        results folder already.
        """

    def notice(self, text: str) -> None:
        """The user should know this; it comes once."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over or interrupted; `summary` is the content of `summary.json`."""
