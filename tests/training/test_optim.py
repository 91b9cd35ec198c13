from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovlm.config.schema import Freeze, TrainConfig
from nanovlm.errors import UserError
from nanovlm.training.optim import build_optimizer, group_parameters, set_learning_rates


class ThreeParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Linear(2, 3)
        self.MP = nn.Linear(3, 4, bias=False)
        self.decoder = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.decoder(self.MP(self.vision_encoder(x)))
        return hidden


def test_groups_carry_their_names_and_peaks() -> None:
    model = ThreeParts()
    config = TrainConfig(lr_mp=3e-3, lr_backbones=2e-4, lr_vision_backbone=1e-5, weight_decay=0.07)
    mp, vision, language = build_optimizer(model, config).param_groups
    assert (mp["name"], mp["peak_lr"], mp["weight_decay"]) == ("mp", 3e-3, 0.07)
    assert mp["params"] == [model.MP.weight]
    assert (vision["name"], vision["peak_lr"]) == ("vision_backbone", 1e-5)
    assert vision["params"] == [*model.vision_encoder.parameters()]
    assert (language["name"], language["peak_lr"]) == ("language_backbone", 2e-4)
    assert language["params"] == [*model.decoder.parameters()]


def test_learning_rates_follow_the_factor() -> None:
    optimizer = build_optimizer(ThreeParts(), TrainConfig(lr_mp=4e-3, lr_backbones=2e-4))
    for factor in (0.1, 0.5):  # of the peak, not of the value before
        set_learning_rates(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [pytest.approx(peak * factor) for peak in (4e-3, 2e-4, 2e-4)]


def test_learning_rate_0_freezes_and_the_next_trial_thaws() -> None:
    model = ThreeParts()
    optimizer = build_optimizer(model, TrainConfig(lr_backbones=0.0))
    assert [group["name"] for group in optimizer.param_groups] == ["mp"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"MP.weight"}
    optimizer = build_optimizer(model, TrainConfig(lr_mp=0.0))
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["vision_backbone", "language_backbone"]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"MP.weight"}
    with pytest.raises(UserError, match="together freeze the whole model"):
        build_optimizer(model, TrainConfig(lr_mp=0.0, lr_backbones=0.0))


PARTS = {"mp": "MP", "vision_backbone": "vision_encoder", "language_backbone": "decoder"}
LR = 1e-3


@pytest.mark.parametrize(
    ("freeze", "rates", "trained"),
    [
        # rates: lr_mp, lr_backbones, lr_vision_backbone, lr_language_backbone
        ("none", (LR, LR, None, None), {"mp", "vision_backbone", "language_backbone"}),
        ("none", (0.0, LR, None, None), {"vision_backbone", "language_backbone"}),
        ("none", (LR, 0.0, None, None), {"mp"}),
        ("none", (LR, LR, 0.0, None), {"mp", "language_backbone"}),
        ("none", (LR, LR, None, 0.0), {"mp", "vision_backbone"}),
        ("none", (LR, 0.0, LR, None), {"mp", "vision_backbone"}),
        ("none", (LR, 0.0, None, LR), {"mp", "language_backbone"}),
        ("none", (0.0, LR, 0.0, LR), {"language_backbone"}),
        ("vision_encoder", (LR, LR, None, None), {"mp", "language_backbone"}),
        ("vision_encoder", (0.0, LR, None, None), {"language_backbone"}),
        ("vision_encoder", (LR, 0.0, None, None), {"mp"}),
        ("vision_encoder", (LR, LR, LR, 0.0), {"mp"}),
        ("backbones", (LR, LR, None, None), {"mp"}),
        ("backbones", (LR, 0.0, LR, LR), {"mp"}),
    ],
)
def test_every_parameter_is_in_one_group_or_frozen(
    freeze: Freeze, rates: tuple[float, float, float | None, float | None], trained: set[str]
) -> None:
    model = ThreeParts()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as another trial may have left it
    mp, backbones, vision, language = rates
    config = TrainConfig(
        lr_mp=mp,
        lr_backbones=backbones,
        lr_vision_backbone=vision,
        lr_language_backbone=language,
        freeze=freeze,
    )
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in optimizer.param_groups}
    parts = {g: {n.partition(".")[0] for n in members} for g, members in groups.items()}
    assert parts == {group: {PARTS[group]} for group in trained}
    in_a_group = [name for members in groups.values() for name in members]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert sorted(in_a_group + frozen) == sorted(names.values())
    assert {n.partition(".")[0] for n in frozen} == {PARTS[g] for g in PARTS.keys() - trained}


@pytest.mark.parametrize(
    "changes",
    [
        {"freeze": "backbones"},
        {"lr_backbones": 0.0},
        {"freeze": "vision_encoder", "lr_backbones": 0.0},
        {"freeze": "vision_encoder", "lr_vision_backbone": 1e-4, "lr_language_backbone": 0.0},
    ],
)
def test_nothing_to_train_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="together freeze the whole model"):
        build_optimizer(ThreeParts(), TrainConfig(lr_mp=0.0, **changes))


def test_what_freezes_the_whole_model_is_named() -> None:
    config = TrainConfig(lr_mp=0.0, lr_vision_backbone=0.0, lr_language_backbone=0.0)
    with pytest.raises(UserError) as caught:
        build_optimizer(ThreeParts(), config)
    assert str(caught.value).startswith(
        "lr_mp=0.0, lr_backbones=0.0001, lr_vision_backbone=0.0, lr_language_backbone=0.0 and "
        "freeze='none' together freeze the whole model"
    )


def test_every_parameter_belongs_to_a_group() -> None:
    model = ThreeParts()
    model.register_module("adapter", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"belong to no group.*adapter\.bias.*adapter\.weight"):
        group_parameters(model)
    del model.adapter, model.MP
    with pytest.raises(ValueError, match=r"groups without a parameter: \['mp'\]"):
        group_parameters(model)


def test_steps_equal_plain_adamw() -> None:
    """Fused or not, the optimizer is torch's AdamW with its betas and epsilon, on both groups."""
    torch.manual_seed(0)
    model, reference = ThreeParts(), ThreeParts()
    reference.load_state_dict(model.state_dict())
    config = TrainConfig(lr_mp=1e-2, lr_backbones=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    plain = torch.optim.AdamW(
        [
            {"params": reference.MP.parameters(), "lr": 1e-2},
            {"params": [p for n, p in reference.named_parameters() if "MP" not in n], "lr": 1e-3},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        fused=False,
        foreach=False,
    )
    for _ in range(5):
        x = torch.randn(7, 2)
        for one, its_optimizer in ((model, optimizer), (reference, plain)):
            its_optimizer.zero_grad()
            one(x).square().mean().backward()
            its_optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
