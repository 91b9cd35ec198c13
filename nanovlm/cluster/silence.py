"""When a worker group that gives no sign of life is taken for dead."""

STALL_FACTOR = 10
"""A group is taken for dead after so many times the longest silence of one that was at work."""
LEAST_STALL_SECONDS = 300.0
FIRST_STALL_SECONDS = 1800.0
"""The least while no trial has reported: downloads and the first compilation may take long."""


class Silence:
    """The last sign of life of each group at work; times are of a clock that only goes forward."""

    def __init__(self, stall_seconds: float | None = None) -> None:
        """
        Args:
            stall_seconds: silence that is too long; None follows from the longest that was seen.
        """
        self._stall_seconds = stall_seconds
        self._heard_at: dict[str, float] = {}
        self._longest = 0.0
        self.has_report = False
        """Whether any trial has come as far."""

    def begin(self, group: str, now: float) -> None:
        """The group is at work from now on, or again after it had to wait for the search."""
        self._heard_at[group] = now

    def hear(self, group: str, now: float, was_at_work: bool) -> None:
        """Take in a sign of life; what went before it was no silence if the group had to wait."""
        if was_at_work:
            self._longest = max(self._longest, now - self._heard_at[group])
        self._heard_at[group] = now

    def end(self, group: str) -> None:
        """The group is not at work any more."""
        del self._heard_at[group]

    def limit(self) -> float:
        """Return the seconds after which a group at work is taken for dead."""
        if self._stall_seconds is not None:
            return self._stall_seconds
        least = LEAST_STALL_SECONDS if self.has_report else FIRST_STALL_SECONDS
        return max(least, STALL_FACTOR * self._longest)

    def too_long(self, now: float) -> list[str]:
        """Return the groups that have been silent for too long."""
        limit = self.limit()
        return [group for group, heard_at in self._heard_at.items() if now - heard_at > limit]
