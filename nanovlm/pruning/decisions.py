"""What was decided on reports at milestones, and the log of it: `rungs.jsonl`.

Each decision is written before anyone acts on it, so after a kill the rungs are as they were, and a
report that is made again gets the decision that it got.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovlm.files import append, drop_cut_line


@dataclass(frozen=True)
class PruningDecision:
    """What became of a trial at a milestone; a line of the log.

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

    def as_line(self) -> dict[str, Any]:
        """Return the line of the log; with one objective it does not speak of others."""
        line = asdict(self)
        return line if self.others else {k: v for k, v in line.items() if k != "others"}

    @staticmethod
    def of_line(line: Mapping[str, Any]) -> "PruningDecision":
        return PruningDecision(**{**line, "others": tuple(line.get("others", ()))})


@dataclass(frozen=True)
class Withdrawal:
    """A trial has failed: its decisions do not count any more."""

    withdrawn: int
    """The number of the trial."""


class DecisionLog:
    """Appends to the log of a search, and reads it again."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: None keeps nothing.
        """
        self._path = path

    def add(self, decision: PruningDecision) -> None:
        self._write(decision.as_line())

    def withdraw(self, number: int) -> None:
        self._write(asdict(Withdrawal(number)))

    def read(self) -> Iterator[PruningDecision | Withdrawal]:
        """Yield what is there; a last line that was cut was not acted upon and is taken away."""
        if self._path is None or not self._path.exists():
            return
        drop_cut_line(self._path)
        for line in map(json.loads, self._path.read_text(encoding="utf-8").splitlines()):
            yield Withdrawal(**line) if "withdrawn" in line else PruningDecision.of_line(line)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._path is not None:
            append(self._path, json.dumps(line) + "\n")
