"""The optimizer, AdamW over the new projector and each backbone, and its learning rates."""

import math

from torch import nn
from torch.optim import AdamW

from nanovlm.config.schema import STAND_INS, LearningRateSchedule, TrainConfig
from nanovlm.errors import UserError

GROUP_PREFIXES = {
    "mp": "MP.",
    "vision_backbone": "vision_encoder.",
    "language_backbone": "decoder.",
}
"""Beginning of the names of the parameters that belong to each group, by the group's name. The
order is that of AdamW's state on disk, so states from before the backbones were apart still fit."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over the groups of GROUP_PREFIXES, each with its `name` and `peak_lr`.

    A group that `freeze` names or whose learning rate is 0 is frozen: its parameters need no
    gradient, and it is left out. `requires_grad` of every parameter is set, so a model that served
    another trial is as good as new.

    Raises UserError if nothing is left to train.
    """
    groups = []
    for group, named in group_parameters(model).items():
        lr = config.peak_learning_rates[group]
        for parameter in named.values():
            parameter.requires_grad_(lr > 0)
        if lr > 0:
            groups.append({"params": [*named.values()], "name": group, "lr": lr, "peak_lr": lr})
    if not groups:
        keys = ["lr_mp", "lr_backbones", *STAND_INS]
        given = [f"{key}={rate}" for key in keys if (rate := getattr(config, key)) is not None]
        raise UserError(
            f"{', '.join(given)} and freeze={config.freeze!r} together freeze the whole model"
        )
    return AdamW(groups, weight_decay=config.weight_decay, fused=True)


def group_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return each group's parameters with their names, by the prefix of these.

    Raises ValueError that lists the parameters of no group, or the groups without parameters.
    """
    named = dict(model.named_parameters())
    groups = {
        group: [name for name in named if name.startswith(prefix)]
        for group, prefix in GROUP_PREFIXES.items()
    }
    rest = sorted(set(named).difference(*groups.values()))
    if rest:
        raise ValueError(f"parameters that belong to no group of {GROUP_PREFIXES}: {rest}")
    empty = [group for group, names in groups.items() if not names]
    if empty:
        raise ValueError(f"groups without a parameter: {empty}; names are {sorted(named)}")
    return {group: {name: named[name] for name in names} for group, names in groups.items()}


def set_learning_rates(optimizer: AdamW, factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


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
