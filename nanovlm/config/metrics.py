"""The metrics that a search can optimise: which way is better, and which of them are costs.

A report's `metrics` say how good the model is, and repeat to the bit. Its costs say what the
training takes; they follow from the report's `speed`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Mode = Literal["max", "min"]

_LESS_IS_BETTER = ("_loss", "_nll")
_MORE_IS_BETTER = ("_accuracy",)
"""How the names of metrics end that can be objectives; the parts of an accuracy have a `/`."""


class Speed(Protocol):
    """What costs follow from: the `Speed` of a report."""

    @property
    def samples_per_second(self) -> float: ...
    @property
    def peak_memory_gib(self) -> float: ...
    @property
    def model_tflops_per_second(self) -> float: ...


@dataclass(frozen=True)
class Cost:
    """What a configuration takes; less is better, and ratios are compared."""

    of: Callable[[Speed], float]
    equal: float
    """Two costs that differ by less than about this share count as equal: such a difference is
    chance, and not worth a point of accuracy."""


COSTS: Mapping[str, Cost] = {
    "seconds_per_sample": Cost(lambda speed: 1 / speed.samples_per_second, equal=0.05),
    "peak_memory_gib": Cost(lambda speed: speed.peak_memory_gib, equal=0.02),
    "gflops_per_sample": Cost(lambda speed: _gflops(speed), equal=0.02),
}
"""Of training, by their names: seconds without evaluation, of all workers of a trial together;
memory of the worker that occupies most; 10^9 floating-point operations, counted."""


_LEAST_RATIO = 1.2
"""Costs that span less than this factor on a front are not scaled up to the other objectives: the
rest is mostly chance."""


def is_score(metric: str) -> bool:
    """Return whether a metric of reports says how good a model is."""
    return metric.endswith((*_LESS_IS_BETTER, *_MORE_IS_BETTER)) or "/" in metric


def natural_mode(metric: str) -> Mode | None:
    """Return which way is better; None if the name does not tell."""
    if metric in COSTS or metric.endswith(_LESS_IS_BETTER):
        return "min"
    return "max" if is_score(metric) else None


def least_extent(metric: str) -> float:
    """Return how far apart losses of a metric (`Objective.loss`) have to lie to count in full."""
    return math.log(_LEAST_RATIO) if metric in COSTS else 0.0


def _gflops(speed: Speed) -> float:
    # The time by which both rates were divided cancels out, but for the last digits.
    return float(f"{1000 * speed.model_tflops_per_second / speed.samples_per_second:.6g}")
