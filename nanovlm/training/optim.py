"""The optimizer: AdamW over two named groups, the new projector and the two backbones."""

from torch import nn
from torch.optim import AdamW

from nanovlm.config import TrainConfig
from nanovlm.errors import UserError

GROUP_PREFIXES = {"mp": ("MP.",), "backbones": ("vision_encoder.", "decoder.")}
"""Beginnings of the names of the parameters that belong to each group."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over the groups `mp` and `backbones`, each with its `name` and `peak_lr`.

    A group with learning rate 0 is frozen: its parameters want no gradient and are left out.
    `requires_grad` of every parameter is set, so a model that served another trial is as good as
    new. Raises UserError if nothing is left to train.
    """
    peak_lrs = {"mp": config.lr_mp, "backbones": config.lr_backbones}
    if not any(peak_lrs.values()):
        raise UserError("lr_mp and lr_backbones are both 0, which freezes the whole model")
    groups = []
    for name, parameters in group_parameters(model).items():
        for parameter in parameters:
            parameter.requires_grad_(peak_lrs[name] > 0)
        if peak_lrs[name] > 0:
            lr = peak_lrs[name]
            groups.append({"params": parameters, "name": name, "lr": lr, "peak_lr": lr})
    return AdamW(groups, weight_decay=config.weight_decay, fused=True)


def group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return each group's parameters by the prefix of their names.

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
    return {group: [named[name] for name in names] for group, names in groups.items()}


def set_learning_rates(optimizer: AdamW, factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
