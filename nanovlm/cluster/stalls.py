"""Which worker groups have been silent for too long, so that they count as lost.

A group that starts is silent until its workers are there.
"""

STALL_FACTOR = 10
"""A group is lost after so many times the longest silence of any group at work."""
LEAST_STALL_SECONDS = 300.0
FIRST_STALL_SECONDS = 1800.0
"""The least while no trial has reported: downloads and the first compilation may take long."""
LEAST_START_SECONDS = 120.0
"""The least for a group that starts, whatever limit is given: Ray starts processes, which import
torch and meet each other."""


class StallDetector:
    """Keeps when each group that starts or works gave its last sign of life; its clock only goes
    forward."""

    def __init__(self, limit_seconds: float | None = None) -> None:
        """
        Args:
            limit_seconds: the silence after which a group is lost; None: see `limit_seconds`.
        """
        self._given = limit_seconds
        self._heard_at: dict[str, float] = {}  # by group at work
        self._started_at: dict[str, float] = {}  # by group whose workers are not there yet
        self._longest_silence = 0.0
        self.has_report = False
        """Whether any trial has reported."""

    def limit_seconds(self) -> float:
        """Return the silence after which a group at work is lost."""
        if self._given is not None:
            return self._given
        least = LEAST_STALL_SECONDS if self.has_report else FIRST_STALL_SECONDS
        return max(least, STALL_FACTOR * self._longest_silence)

    def expect(self, group: str, now: float) -> None:
        """A group starts, and will say that it is there."""
        self._started_at[group] = now

    def arrive(self, group: str) -> None:
        """The workers of a group are there, or need not be waited for any more."""
        self._started_at.pop(group, None)

    def reset(self, group: str, now: float) -> None:
        """Count the silence of the group from now on, whatever it was before."""
        self._heard_at[group] = now

    def hear(self, group: str, now: float) -> None:
        """Take in a sign of life of a group that was free to give one before."""
        self._longest_silence = max(self._longest_silence, now - self._heard_at[group])
        self._heard_at[group] = now

    def forget(self, group: str) -> None:
        """The group is not at work any more."""
        del self._heard_at[group]

    def silent_groups(self, now: float) -> dict[str, float]:
        """Return the groups that have been silent for too long, with the limit of each in
        seconds."""
        at_work = self.limit_seconds()
        starting = max(at_work, LEAST_START_SECONDS)
        heard = [(group, at, at_work) for group, at in self._heard_at.items()]
        heard += [(group, at, starting) for group, at in self._started_at.items()]
        return {group: limit for group, at, limit in heard if now - at > limit}
