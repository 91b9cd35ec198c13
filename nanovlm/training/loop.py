"""The training loop: a generator that yields its progress and leaves the rest to its caller.

One optimizer step takes `batch_size` samples, however many workers and micro-batches share them:
the loss is the sum over all answer tokens of the global batch divided by their number.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.config.schema import TrainConfig
from nanovlm.data.samples import PreparedSamples
from nanovlm.errors import UserError
from nanovlm.messages import Speed
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import world_size
from nanovlm.training.meter import Meter
from nanovlm.training.passes import MicroBatchSize
from nanovlm.training.state import TrainingState
from nanovlm.training.steps import SmoothedLoss, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where the training stands."""

    step: int
    """Optimizer steps taken."""
    samples_seen: int
    train_loss: float
    """Loss per answer token, smoothed over about 20 steps; independent of the milestones."""
    learning_rates: dict[str, float]
    """Of the last step, by parameter group; a frozen group has none."""
    first_step_at: float
    """When the first step ended, on the clock of `time.perf_counter`."""
    speed: Speed
    """Since the progress before; what the caller does in between is left out."""
    is_final: bool
    """True after the last step of the full budget."""
    state: Callable[[], TrainingState]
    """Gives what a later training can start from; to be called by all workers or none, before the
    training goes on."""


OnStep = Callable[[int, float, float], None]
"""Called after each optimizer step with its number, the smoothed loss, and the seconds that the
training has waited for batches since it began."""


def never() -> bool:
    """Return False: no interruption."""
    return False


def unwatched(step: int, train_loss: float, waited_seconds: float) -> None:
    """Nobody looks at single steps."""


def num_steps(config: TrainConfig, num_samples: int) -> int:
    """Return the optimizer steps of the full budget for epochs of `num_samples`."""
    return max(1, full_budget(config, num_samples) // config.batch_size)


def full_budget(config: TrainConfig, num_samples: int) -> int:
    """Return the samples of `epochs` or of `max_steps`, whichever come first, of `num_samples`.

    What is left of the last epoch may be less than a batch, and is not trained on.
    """
    epochs = config.epochs * num_samples
    return epochs if config.max_steps is None else min(epochs, config.max_steps * config.batch_size)


def train(
    model: VisionLanguageModel,
    samples: PreparedSamples,
    config: TrainConfig,
    milestones: Sequence[int],
    *,
    device: torch.device,
    interrupted: Callable[[], bool] = never,
    on_step: OnStep = unwatched,
    micro_batch_size: MicroBatchSize | None = None,
    start: TrainingState | None = None,
) -> Generator[Progress, None, None]:
    """Train `model` in place; yield at the first step that reaches each milestone and at the end.

    Every worker runs this with the same arguments and yields at the same steps; `interrupted` may
    differ, and is called once a step. Raises TrialInterrupted, NonFiniteLossError with the weights
    of the step before, and UserError for milestones and samples that cannot be.

    Args:
        micro_batch_size: what an earlier trial of the same model has found to fit.
        start: the state of such a training to go on from; what it yielded before is not yielded
            again.
    """
    _check_shares(config.batch_size)
    total_steps = num_steps(config, samples.epoch_size)
    report_steps = _report_steps(milestones, config.batch_size, total_steps)
    encodes_images = not samples.images.is_floating_point()
    meter = Meter(config, device, encodes_images=encodes_images)
    steps = Steps(model, samples, config, total_steps, device, meter, micro_batch_size)
    train_loss = SmoothedLoss(start)
    if start is not None:
        steps.restore(start)
    first_step = 1 if start is None else start.step + 1
    model.train()
    launched: deque[tuple[int, Tensor]] = deque()
    for step in range(first_step, total_steps + 1):
        is_interrupted = interrupted()
        launched.append((step, steps.take(step, is_interrupted)))
        if step < total_steps:
            steps.fetch(step + 1)  # while the device computes
        is_waited_for = is_interrupted or step in report_steps
        while len(launched) > (0 if is_waited_for else steps.max_ahead):
            done, numbers = launched.popleft()
            train_loss.add(steps.finish(done, numbers))
            if done == first_step:
                first_step_at = time.perf_counter()
            on_step(done, train_loss.value, meter.waited_seconds)
        if step in report_steps:
            yield Progress(
                step=step,
                samples_seen=step * config.batch_size,
                train_loss=train_loss.value,
                learning_rates=steps.learning_rates(),
                first_step_at=first_step_at,
                speed=meter.read(),
                is_final=step == total_steps,
                state=functools.partial(steps.state, step, train_loss),
            )
            meter.start()


def _check_shares(batch_size: int) -> None:
    if batch_size < world_size():
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {world_size()} workers: "
            "each takes at least one sample of a step"
        )


def _report_steps(milestones: Sequence[int], batch_size: int, total_steps: int) -> set[int]:
    """Return the steps to report at: the first that reach each milestone, and the last."""
    budget = total_steps * batch_size
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise UserError(f"milestones must be positive and ascending, got {tuple(milestones)}")
    if milestones and milestones[-1] > budget:
        raise UserError(
            f"milestones must be within the full budget of {budget} samples "
            f"({total_steps} steps of batch_size {batch_size}), got {tuple(milestones)}"
        )
    return {math.ceil(milestone / batch_size) for milestone in milestones} | {total_steps}
