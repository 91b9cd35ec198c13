"""The learning rate of a step, as a pure function of numbers."""

import math


def learning_rate_factor(
    step: int, num_steps: int, warmup_ratio: float, min_lr_ratio: float
) -> float:
    """Return the share of the peak learning rate that `step` (from 0) of `num_steps` uses.

    It rises linearly over the first `warmup_ratio` of the steps, reaches 1 with the last of them,
    and then falls as half a cosine towards `min_lr_ratio`, where the full budget ends.
    """
    assert 0 <= step < num_steps, f"step {step} is not one of {num_steps} steps"
    num_warmup_steps = round(warmup_ratio * num_steps)
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
