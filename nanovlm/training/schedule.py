"""The learning rate of a step, as a pure function of numbers."""

import math

from nanovlm.config import LearningRateSchedule


def learning_rate_factor(
    step: int,
    num_steps: int,
    warmup_ratio: float,
    min_lr_ratio: float,
    schedule: LearningRateSchedule = "cosine",
) -> float:
    """Return the share of the peak learning rate that `step` (from 0) of `num_steps` uses.

    It rises linearly over the first `warmup_ratio` of the steps and reaches 1 with the last of
    them. Then it falls towards `min_lr_ratio`, where the full budget ends: as half a cosine or
    linearly. A constant one stays at 1.
    """
    assert 0 <= step < num_steps, f"step {step} is not one of {num_steps} steps"
    num_warmup_steps = round(warmup_ratio * num_steps)
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * _height(schedule, progress)


def _height(schedule: LearningRateSchedule, progress: float) -> float:
    """Return how far above the end (0) the learning rate is, 1 at the peak."""
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0
