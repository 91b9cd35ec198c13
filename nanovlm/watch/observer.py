"""Who is told what happens in a search or a single run while it is under way.

The terminal, the report, trackers and gauges are observers; the run itself knows none of them.
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
    dashboard_url: str | None = None
    """Of Ray."""
    is_own_cluster: bool = True
    """Whether the cluster was started by this program."""
    concurrency: int = 1
    """Trials at once."""
    records: Sequence[TrialRecord] = ()
    """Trials that ended before the search was interrupted, in the order of their end."""
    confirmed: Sequence[TrialRecord] = ()
    """Confirming runs that ended before."""
    earlier_seconds: float = 0.0
    """How long the search ran before."""


class Observer:
    """Told of everything; each method does nothing here.

    The methods are called one after another, in a thread that writes the results folder too: what
    takes long belongs into a thread of the observer's own. An observer that raises an exception is
    told nothing more, and named in the notes of the run's outcome; the run goes on.
    """

    @property
    def problem(self) -> str | None:
        """What has gone wrong here without ending the run, in a sentence; None if nothing has.

        The other observers are told of it, as of anything that a person should know.
        """
        return None

    @property
    def notes(self) -> Sequence[str]:
        """What a person is to be told at the end: the problem, and what else there is to say."""
        return () if self.problem is None else (self.problem,)

    def begin(self, start: RunStart) -> None:
        """The cluster is there; trials are about to begin."""

    def progress(self, update: ProgressUpdate) -> None:
        """A running trial is so far."""

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial, or a run that confirms one, was submitted, taken up, has reported or has ended.

        One that waits for a free worker group has no `worker_group` yet. What has ended is in the
        results folder already.
        """

    def notice(self, text: str) -> None:
        """A person should know this; it is told once."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over or interrupted.

        Args:
            summary: the content of `summary.json`; its `ended_by` says why.
        """
