"""The training loop: a generator that yields its progress and leaves the rest to its caller.

One optimizer step takes `batch_size` samples, however many workers and micro-batches share them:
the loss is the sum over all answer tokens of the global batch divided by their number.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanovlm.config import TrainConfig
from nanovlm.data.batches import (
    collate,
    count_answer_tokens,
    image_buffer,
    samples_in_order,
    text_lengths,
)
from nanovlm.data.prepared import PreparedSamples
from nanovlm.errors import UserError
from nanovlm.messages import Speed
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, rank, world_size
from nanovlm.training.forward import answer_loss_sum
from nanovlm.training.meter import Meter
from nanovlm.training.optim import build_optimizer, set_learning_rates
from nanovlm.training.schedule import learning_rate_factor

LOSS_DECAY = 0.95
"""What one step leaves of the steps before it in the smoothed training loss."""


class TrialInterrupted(Exception):
    """Someone asked this trial to end; it ended at the next optimizer step."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became NaN or infinite; the weights are those of the step before."""

    def __init__(self, step: int, quantity: str, value: float) -> None:
        super().__init__(step, quantity, value)
        self.step, self.quantity, self.value = step, quantity, value

    def __str__(self) -> str:
        return f"{self.quantity} is {self.value} at step {self.step}"


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


def never() -> bool:
    """Return False: nobody interrupts."""
    return False


def num_steps(config: TrainConfig, num_samples: int) -> int:
    """Return the optimizer steps of the full budget for `num_samples` training samples."""
    return max(1, config.epochs * num_samples // config.batch_size)


def train(
    model: VisionLanguageModel,
    samples: PreparedSamples,
    config: TrainConfig,
    milestones: Sequence[int],
    *,
    device: torch.device,
    interrupted: Callable[[], bool] = never,
) -> Generator[Progress, None, None]:
    """Train `model` in place; yield at the first step that reaches each milestone and at the end.

    Every worker runs this with the same arguments and yields at the same steps; `interrupted` may
    differ, and is asked once a step. Raises TrialInterrupted, NonFiniteLossError before the step
    that would spoil the weights, and UserError for milestones that cannot be.
    """
    _check_shares(config.batch_size)
    total_steps = num_steps(config, len(samples))
    report_steps = _report_steps(milestones, config.batch_size, total_steps)
    optimizer = build_optimizer(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    train_loss = _SmoothedLoss()
    share = -(-config.batch_size // world_size())
    images = image_buffer(samples, min(share, config.micro_batch_size or share))
    meter = Meter(config, device)
    model.train()
    for step in range(1, total_steps + 1):
        factor = learning_rate_factor(
            step - 1, total_steps, config.warmup_ratio, config.min_lr_ratio, config.lr_schedule
        )
        set_learning_rates(optimizer, factor)
        optimizer.zero_grad()
        loss = _backward(model, samples, config, step, device, images, meter)
        stop = torch.full((), float(interrupted()), device=device)
        gradients = [p.grad for p in parameters]
        all_reduce_sum_([*gradients, loss, stop])
        norm = get_total_norm(gradients)
        loss_value, norm_value, stop_value = torch.stack([loss, norm, stop]).tolist()  # device sync
        if stop_value:
            raise TrialInterrupted(f"interrupted at step {step}")
        _check_finite(step, loss_value, norm_value)
        if config.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        optimizer.step()
        indices = _global_indices(samples, config, step)
        meter.add(text_lengths(samples, indices), count_answer_tokens(samples, indices))
        train_loss.add(loss_value)
        if step == 1:
            first_step_at = time.perf_counter()
        if step in report_steps:
            yield Progress(
                step=step,
                samples_seen=step * config.batch_size,
                train_loss=train_loss.value,
                learning_rates={g["name"]: g["lr"] for g in optimizer.param_groups},
                first_step_at=first_step_at,
                speed=meter.read(),
                is_final=step == total_steps,
            )
            meter.start()


def _check_shares(batch_size: int) -> None:
    if batch_size < world_size():
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {world_size()} workers: "
            "each takes at least one sample of a step"
        )


def _backward(
    model: VisionLanguageModel,
    samples: PreparedSamples,
    config: TrainConfig,
    step: int,
    device: torch.device,
    images: Tensor,
    meter: Meter,
) -> Tensor:
    """Add this worker's part of the gradients of `step`; return its part of the loss, float32[]."""
    indices = _global_indices(samples, config, step)
    num_answer_tokens = count_answer_tokens(samples, indices)
    total = torch.zeros((), device=device)
    for micro_batch in _micro_batches(indices[rank() :: world_size()], config.micro_batch_size):
        with meter.waiting():
            batch = collate(samples, micro_batch, buffer=images)
        loss = answer_loss_sum(model, batch, device) / num_answer_tokens
        loss.backward()
        total += loss.detach()
    return total


def _global_indices(samples: PreparedSamples, config: TrainConfig, step: int) -> np.ndarray:
    """Return the samples of a step, those of all workers."""
    stop = step * config.batch_size
    return samples_in_order(len(samples), config.seed, stop - config.batch_size, stop)


def _micro_batches(indices: np.ndarray, size: int | None) -> Iterator[np.ndarray]:
    size = size or len(indices)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


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


def _check_finite(step: int, loss: float, gradient_norm: float) -> None:
    for quantity, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise NonFiniteLossError(step, quantity, value)


class _SmoothedLoss:
    """An exponential average without the pull of its start towards 0."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> None:
        self._sum = LOSS_DECAY * self._sum + loss
        self._weight = LOSS_DECAY * self._weight + 1

    @property
    def value(self) -> float:
        return self._sum / self._weight
