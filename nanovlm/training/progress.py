"""How far a trial is, told about once a second while it trains: for people who watch."""

import time
from collections.abc import Callable

from nanovlm.messages import ProgressUpdate, Stage

SECONDS_BETWEEN_PULSES = 1.0

OnUpdate = Callable[[ProgressUpdate], None]


def ignore(update: ProgressUpdate) -> None:
    """Nobody watches."""


class UpdateTimer:
    """Makes updates of a trial out of its steps; where none is due, it only looks at the clock."""

    def __init__(
        self,
        trial_id: str,
        batch_size: int,
        total_steps: int,
        on_update: OnUpdate,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            clock: returns seconds.
        """
        self._trial_id = trial_id
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._on_update = on_update
        self._clock = clock
        self._step, self._loss, self._waited = 0, 0.0, 0.0  # at the last step
        self._rate, self._wait_fraction = 0.0, 0.0  # of the last update
        self._since: tuple[float, int, float] | None = None  # clock, step, seconds waited

    def after_step(self, step: int, train_loss: float, waited_seconds: float) -> None:
        """Take in an optimizer step.

        Args:
            train_loss: smoothed.
            waited_seconds: for batches, since the trial began.
        """
        self._step, self._loss, self._waited = step, train_loss, waited_seconds
        if self._since is None:  # the first step compiles and warms up: it says nothing of speed
            self.training_goes_on()
            return
        since, first_step, waited_before = self._since
        seconds = self._clock() - since
        if seconds >= SECONDS_BETWEEN_PULSES:
            self._rate = (step - first_step) * self._batch_size / seconds
            self._wait_fraction = min(1.0, (waited_seconds - waited_before) / seconds)
            self._tell("training")
            self.training_goes_on()

    def evaluation_begins(self) -> None:
        """Tell at once that the model is asked the benchmark's questions."""
        self._tell("evaluating")

    def training_goes_on(self) -> None:
        """Leave what was since the last step out of the rates to come."""
        self._since = self._clock(), self._step, self._waited

    def _tell(self, stage: Stage) -> None:
        self._on_update(
            ProgressUpdate(
                trial_id=self._trial_id,
                stage=stage,
                step=self._step,
                samples_seen=self._step * self._batch_size,
                total_samples=self._total_steps * self._batch_size,
                train_loss=self._loss,
                samples_per_second=self._rate,
                data_wait_fraction=self._wait_fraction,
            )
        )
