"""Which way metrics are better, and what costs reports tell of."""

import math

import pytest

from nanovlm.config.metrics import COSTS, natural_mode
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.messages import measured
from nanovlm.training.flops import model_flops, trained_parts
from tests.records import make_report, make_speed


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("mmstar_accuracy", "max"),
        ("mmstar_accuracy/math", "max"),
        ("mmstar_letter_nll", "min"),
        ("val_loss", "min"),
        ("seconds_per_sample", "min"),
        ("gflops_per_sample", "min"),
        ("accuracy", None),
    ],
)
def test_which_way_is_better(metric: str, mode: str | None) -> None:
    assert natural_mode(metric) == mode


def test_costs_follow_from_the_speed() -> None:
    lengths, labels = [20, 31, 25], 12
    config: TrainConfig = build_config(preset_layer("digits"))
    flops = model_flops(config.vlm, trained_parts(config)).of_samples(lengths, labels)
    found = []
    for seconds in (0.7, 3.1):  # on two machines
        speed = make_speed(
            samples_per_second=len(lengths) / seconds,
            model_tflops_per_second=flops / seconds / 1e12,
            peak_memory_gib=2.5,
        )
        found.append(measured(make_report(100, {"val_loss": 1.0}, speed=speed)))
        assert found[-1]["seconds_per_sample"] == pytest.approx(seconds / 3)
        assert found[-1]["peak_memory_gib"] == 2.5 and found[-1]["val_loss"] == 1.0
    assert found[0]["gflops_per_sample"] == found[1]["gflops_per_sample"], "to the bit"
    assert found[0]["gflops_per_sample"] == pytest.approx(flops / 3 / 1e9, rel=1e-5)


def test_a_report_without_a_speed_has_no_costs() -> None:
    assert measured(make_report(100, {"val_loss": 1.0})) == {"val_loss": 1.0}


def test_losses_of_costs_are_ratios_and_small_differences_are_none() -> None:
    cost, loss = Objective(metric="seconds_per_sample"), Objective(metric="val_loss")
    accuracy = Objective(metric="mmstar_accuracy")
    assert cost.loss(2e-3) - cost.loss(1e-3) == pytest.approx(math.log(2), abs=0.05)
    assert cost.loss(1.001e-3) == cost.loss(1e-3) < cost.loss(1.1e-3)
    assert cost.value_at(cost.loss(2e-3)) == pytest.approx(2e-3, rel=0.03)
    assert loss.loss(0.2) == 0.2 == loss.value_at(0.2)
    assert accuracy.loss(0.2) == -0.2 == -accuracy.value_at(-0.2)
    assert all(0 < cost.equal < 0.1 for cost in COSTS.values())
