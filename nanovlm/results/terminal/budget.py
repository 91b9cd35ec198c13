"""How much of a search's budget is used up, and when it will be."""

from dataclasses import dataclass

from nanovlm.search.sections import Budget


@dataclass(frozen=True)
class Spent:
    """The limit of a budget that will be reached first, and how far it is."""

    share: float
    """From 0 to 1."""
    text: str
    """Such as `9 of 16 trials`."""

    def seconds_left(self, seconds: float) -> float | None:
        """Return the seconds until the limit if all goes on at its pace; None before it has one.

        Args:
            seconds: that the search has taken so far.
        """
        return seconds * (1 - self.share) / self.share if self.share else None


def nearest_limit(
    budget: Budget, *, num_ended: int, seconds: float, gpu_hours: float
) -> Spent | None:
    """Return the limit that most is spent of; None if none of them can be foreseen.

    `budget.target` and `budget.patience` end a search when they like.
    """
    limits = []
    if budget.trials is not None:
        limits.append(Spent(num_ended / budget.trials, f"{num_ended} of {budget.trials} trials"))
    if budget.hours is not None:
        hours = seconds / 3600
        limits.append(Spent(hours / budget.hours, f"{hours:.2g} of {budget.hours:g} hours"))
    if budget.gpu_hours is not None:
        share = gpu_hours / budget.gpu_hours
        limits.append(Spent(share, f"{gpu_hours:.2g} of {budget.gpu_hours:g} GPU-hours"))
    if not limits:
        return None
    nearest = max(limits, key=lambda limit: limit.share)
    return Spent(min(1.0, nearest.share), nearest.text)


def describe_budget(budget: Budget) -> str:
    """Return all limits, such as `16 trials, 2 hours`."""
    limits = {
        "{:g} trials": budget.trials,
        "{:g} hours": budget.hours,
        "{:g} GPU-hours": budget.gpu_hours,
        "a value of {:g}": budget.target,
        "{:g} trials without a new best": budget.patience,
    }
    return ", ".join(text.format(value) for text, value in limits.items() if value is not None)
