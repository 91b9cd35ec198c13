"""How often a sampler failed: a search whose sampler always does is a random search."""

from collections.abc import Callable
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial

FAILURE = "sampler_failure"
"""Attribute of Optuna's trials: why the sampler failed, so that the trial was drawn at random."""

_LONGEST_REASON = 200
"""Characters."""


@dataclass
class SamplerFailures:
    """Counts what a sampler was asked, and tells a person of the first failure."""

    tell: Callable[[str], None] = lambda text: None
    """Told of the first failure, when it happens."""
    sampler: str = ""
    """The sampler's name."""
    _num_asked: int = 0
    _reasons: list[str] = field(default_factory=list)

    def __reduce__(self) -> tuple[type["SamplerFailures"], tuple[()]]:
        return SamplerFailures, ()  # Tune pickles what it is given into a state that nobody reads

    def restore(self, trial: FrozenTrial) -> None:
        """Count a trial that the search had asked for before it was interrupted."""
        self._num_asked += 1
        if FAILURE in trial.user_attrs:
            self._reasons.append(trial.user_attrs[FAILURE])

    def count(self, number: int, trial: optuna.Trial, errors: list[Exception]) -> None:
        """Count a new trial.

        Args:
            number: of the trial.
            errors: of the sampler, each of which made it draw at random.
        """
        if not errors:
            self._num_asked += 1
            return
        lines = f"{type(errors[0]).__name__}: {errors[0]}".split("\n")
        reason = lines[0][:_LONGEST_REASON]
        trial.set_user_attr(FAILURE, reason)  # the storage may fail here: then it is asked anew
        self._num_asked += 1
        if not self._reasons:
            self.tell(
                f"the {self.sampler} sampler failed, and trial {number} is drawn at random: "
                f"{reason}; see logs/driver.log"
            )
        self._reasons.append(reason)

    def note(self) -> str | None:
        """Return what a person is to be told at the end; None if the sampler never failed."""
        if not self._reasons:
            return None
        return (
            f"the {self.sampler} sampler failed in {len(self._reasons)} of {self._num_asked} "
            f"suggestions, which were random instead: {self._reasons[-1]}"
        )
