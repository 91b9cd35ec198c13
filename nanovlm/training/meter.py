"""Measures how fast training goes, without slowing it down, and reports progress as it trains.

    meter = Meter(config, device)
    for step in ...:
        with meter.waiting():
            ...                                 # a batch to the device
        ...                                     # forward, backward, optimizer
        meter.add(text_lengths, num_labels)
        if step in report_steps:
            speed = meter.read()
            ...                                 # evaluation
            meter.start()

On a GPU time is taken by events in the stream of the computation, so no step waits for the device.
The wait for a batch runs from the moment when the device has done all work that it was given before
to the one when the batch is there: nothing, where the batch came while the device was at work. Only
a report waits for its last step, as the evaluation after it would.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.messages import ProgressUpdate, Speed, Stage
from nanovlm.parallel import gather_objects, world_size
from nanovlm.training.flops import model_flops, peak_flops_per_second, trained_parts

GIB = 2**30
SECONDS_BETWEEN_UPDATES = 1.0


class Clock(Protocol):
    """Sets marks in the course of the work, and measures the time between them."""

    def mark(self) -> Any:
        """Return a mark for the end of the work that was begun before."""

    def has_passed(self, mark: Any) -> bool:
        """Return whether the work before `mark` is done."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks, once `end` has passed."""


class HostClock:
    """For work that is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class StreamClock:
    """For work on a GPU, in its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass
class _Window:
    """Consecutive steps and what was counted in them."""

    start: Any
    end: Any = None
    num_samples: int = 0
    num_labels: int = 0
    flops: int = 0
    waits: deque[tuple[Any, Any]] = field(default_factory=deque)
    waited_seconds: float = 0.0
    """Of waits that are no longer in `waits`."""


class Meter:
    """The speed of one trial; all its workers drive one each, alike.

    Time counts from the beginning, or the last `start`, to `read`: what happens between a report
    and the steps after it, the evaluation, is left out. The first step of a trial, which compiles
    and warms up, counts only if it is all that a report has.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        clock: Clock | None = None,
        encodes_images: bool = True,
    ) -> None:
        """Begin.

        Args:
            encodes_images: whether the vision encoder works in each pass, or has done so before.
        """
        on_gpu = device.type == "cuda"
        self._device = device
        self._clock = clock or (StreamClock(device) if on_gpu else HostClock())
        self._flops = model_flops(config.vlm, trained_parts(config))
        if not encodes_images:
            self._flops = replace(self._flops, vision_encoder=0)
        self._peak = peak_flops_per_second(torch.cuda.get_device_name(device)) if on_gpu else None
        self._first_step: _Window | None = None
        self._num_steps = 0
        self.waited_seconds = 0.0
        """Of all waits since the meter was made that are known to be over."""
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.start()

    def start(self) -> None:
        """Begin to count again, after a report."""
        self._window = _Window(self._clock.mark())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time in which the compute has nothing to do but wait for a batch.

        The batch is to be there for the current stream at the end of the context: if it comes by a
        stream of its own, the current one waits for that.
        """
        asked = self._clock.mark()
        yield
        self._window.waits.append((asked, self._clock.mark()))

    def add(
        self,
        text_lengths: Sequence[int] | np.ndarray,
        num_labels: int,
        num_images: Sequence[int] | np.ndarray | int = 1,
    ) -> None:
        """Count an optimizer step that has been made, by its whole global batch.

        Args:
            text_lengths: int[batch_size], the text tokens that each sample gave the decoder.
            num_labels: tokens that were learnt.
            num_images: int[batch_size], the images or tiles of each sample.
        """
        window = self._window
        window.num_samples += len(text_lengths)
        window.num_labels += num_labels
        window.flops += self._flops.of_samples(text_lengths, num_labels, num_images)
        self._fold_waits(window)
        self._num_steps += 1
        if self._num_steps == 1:
            window.end = self._clock.mark()
            self._first_step, self._window = window, _Window(window.end)

    def read(self) -> Speed:
        """Return the speed since `start`; all workers call it after the same step."""
        window = self._window
        if self._num_steps == 1 and self._first_step is not None:
            window = self._first_step
        window.end = window.end or self._clock.mark()
        seconds = self._clock.seconds(window.start, window.end)
        self._fold_waits(window)
        workers = gather_objects((seconds, window.waited_seconds, self._peak_memory_bytes()))
        longest = max(seconds for seconds, _, _ in workers)
        flops_per_second = window.flops / longest
        best = None if self._peak is None else self._peak * world_size()
        return Speed(
            samples_per_second=window.num_samples / longest,
            answer_tokens_per_second=window.num_labels / longest,
            data_wait_fraction=max(waited / seconds for seconds, waited, _ in workers),
            model_tflops_per_second=flops_per_second / 1e12,
            model_flops_utilization=None if best is None else flops_per_second / best,
            peak_memory_gib=max(peak for _, _, peak in workers) / GIB,
        )

    def _fold_waits(self, window: _Window) -> None:
        """Add up the waits that are over, so that few marks are kept."""
        while window.waits and self._clock.has_passed(window.waits[0][1]):
            seconds = self._clock.seconds(*window.waits.popleft())
            window.waited_seconds += seconds
            self.waited_seconds += seconds

    def _peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


OnUpdate = Callable[[ProgressUpdate], None]


def ignore(update: ProgressUpdate) -> None:
    """Nobody watches."""


class UpdateTimer:
    """Sends an update of a trial about once a second, for people who watch.

    Where none is due, a step costs a look at the clock.
    """

    def __init__(
        self,
        trial_id: str,
        batch_size: int,
        total_steps: int,
        on_update: OnUpdate,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin with a trial.

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
        """Count an optimizer step.

        Args:
            train_loss: smoothed.
            waited_seconds: for batches, since the trial began.
        """
        self._step, self._loss, self._waited = step, train_loss, waited_seconds
        if self._since is None:  # the first step compiles and warms up: it is no measure of speed
            self.training_goes_on()
            return
        since, first_step, waited_before = self._since
        seconds = self._clock() - since
        if seconds >= SECONDS_BETWEEN_UPDATES:
            self._rate = (step - first_step) * self._batch_size / seconds
            self._wait_fraction = min(1.0, (waited_seconds - waited_before) / seconds)
            self._send("training")
            self.training_goes_on()

    def evaluation_begins(self) -> None:
        """Send an update now: the model begins to answer the benchmark."""
        self._send("evaluating")

    def training_goes_on(self) -> None:
        """Leave what was since the last step out of the rates to come."""
        self._since = self._clock(), self._step, self._waited

    def _send(self, stage: Stage) -> None:
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
