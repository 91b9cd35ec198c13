"""The optimizer, AdamW over the new projector and the two backbones, and its learning rates."""

import math

from torch import nn
from torch.optim import AdamW

from nanovlm.config.schema import Freeze, LearningRateSchedule, TrainConfig
from nanovlm.errors import UserError

GROUP_PREFIXES = {"mp": ("MP.",), "backbones": ("vision_encoder.", "decoder.")}
"""Beginnings of the names of the parameters that belong to each group."""


FROZEN_PREFIXES: dict[Freeze, tuple[str, ...]] = {
    "none": (),
    "vision_encoder": ("vision_encoder.",),
    "backbones": GROUP_PREFIXES["backbones"],
}
"""Beginnings of the names of the parameters that each value of `freeze` leaves as they are."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over the groups `mp` and `backbones`, each with its `name` and `peak_lr`.

    What `freeze` names, and a group with learning rate 0, is frozen: its parameters need no
    gradient and are left out, and so is a group of which nothing remains. `requires_grad` of
    every parameter is set, so a model that served another trial is as good as new.

    Raises UserError if nothing is left to train.
    """
    peak_lrs = {"mp": config.lr_mp, "backbones": config.lr_backbones}
    frozen_prefixes = FROZEN_PREFIXES[config.freeze]
    groups = []
    for group, named in group_parameters(model).items():
        lr = peak_lrs[group]
        for name, parameter in named.items():
            parameter.requires_grad_(lr > 0 and not name.startswith(frozen_prefixes))
        trained = [parameter for parameter in named.values() if parameter.requires_grad]
        if trained:
            groups.append({"params": trained, "name": group, "lr": lr, "peak_lr": lr})
    if not groups:
        raise UserError(
            f"lr_mp={config.lr_mp}, lr_backbones={config.lr_backbones} and "
            f"freeze={config.freeze!r} together freeze the whole model"
        )
    return AdamW(groups, weight_decay=config.weight_decay, fused=True)


def group_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return each group's parameters with their names, by the prefix of these.

    Raises ValueError that lists the parameters of no group, or the groups without parameters.
    """
    named = dict(model.named_parameters())
    groups = {
        group: [name for name in named if name.startswith(prefixes)]
        for group, prefixes in GROUP_PREFIXES.items()
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
