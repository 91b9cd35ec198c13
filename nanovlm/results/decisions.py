"""What was decided on reports at milestones: the lines of `rungs.jsonl`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from nanovlm.messages import Report, TrialRecord


@dataclass(frozen=True)
class PruningDecision:
    """Whether a trial goes on after a milestone.

    The last one of a trial and a milestone counts: a trial that paused may go on or end later.
    """

    number: int
    """Of the trial."""
    milestone: int
    """In samples seen."""
    samples_seen: int
    """At the report, which is made at the first step that reaches the milestone."""
    value: float
    goes_on: bool
    reason: str
    cutoff: float | None = None
    """What the value was compared with; None where there was nothing to compare with."""
    rung_size: int = 0
    """Trials that were at the milestone before."""
    is_paused: bool = False
    """Whether it does not go on now, but may later."""
    others: tuple[float, ...] = ()
    """The values of the other objectives, if there are several; `value` is that of the first."""

    @property
    def values(self) -> tuple[float, ...]:
        """Of every objective."""
        return (self.value, *self.others)


@dataclass(frozen=True)
class Withdrawal:
    """A trial has failed: its decisions do not count any more."""

    withdrawn: int
    """The number of the trial."""


LINE: TypeAdapter[PruningDecision | Withdrawal] = TypeAdapter(PruningDecision | Withdrawal)


def decision_line(line: PruningDecision | Withdrawal) -> str:
    """Return the line of the log, with its newline; with one objective it has no `others`."""
    content = asdict(line)
    if not content.get("others"):
        content.pop("others", None)
    return json.dumps(content) + "\n"


def last_milestone(milestones: Sequence[int], samples_seen: int) -> int | None:
    """Return the milestone that a report was made at: the last one that is reached, if any."""
    return max((m for m in milestones if m <= samples_seen), default=None)


def decided_reports(record: TrialRecord) -> list[tuple[Report, bool]]:
    """Return each report of an ended trial that was compared with those of others, and whether the
    trial went on after it. A failed one was withdrawn later."""
    if record.state == "failed":
        return [(report, True) for report in record.reports]
    is_pruned = record.end is not None and record.end.was_compared and record.state == "stopped"
    reports = record.reports if is_pruned else record.reports[:-1]
    last = len(record.reports) - 1
    return [(report, index < last) for index, report in enumerate(reports)]
