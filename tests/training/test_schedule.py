from typing import get_args

import pytest

from nanovlm.config.schema import LearningRateSchedule
from nanovlm.training.optim import learning_rate_factor


@pytest.mark.parametrize(
    ("step", "num_steps", "warmup_ratio", "min_lr_ratio", "expected"),
    [
        # linear rise over the first tenth, from the first step on
        (0, 100, 0.1, 0.1, 0.1),
        (4, 100, 0.1, 0.1, 0.5),
        (9, 100, 0.1, 0.1, 1.0),
        # half a cosine over the other 90 steps
        (10, 100, 0.1, 0.1, 1.0),
        (40, 100, 0.1, 0.1, 0.775),
        (55, 100, 0.1, 0.1, 0.55),
        (70, 100, 0.1, 0.1, 0.325),
        (99, 100, 0.1, 0.1, 0.100274),
        # down to zero, and not down at all
        (50, 100, 0.0, 0.0, 0.5),
        (99, 100, 0.0, 0.0, 0.000247),
        (99, 100, 0.0, 1.0, 1.0),
        # no warm-up starts at the peak
        (0, 100, 0.0, 0.1, 1.0),
        # the share of warm-up steps is rounded: 0.29 * 100 is 28.999999999999996
        (28, 100, 0.29, 0.1, 1.0),
        (27, 100, 0.29, 0.1, 28 / 29),
        # the shortest budgets
        (0, 1, 0.03, 0.1, 1.0),
        (0, 2, 0.5, 0.1, 1.0),
        (1, 2, 0.5, 0.1, 1.0),
        (2, 3, 0.99, 0.1, 1.0),
    ],
)
def test_learning_rate_factor(
    step: int, num_steps: int, warmup_ratio: float, min_lr_ratio: float, expected: float
) -> None:
    factor = learning_rate_factor(step, num_steps, warmup_ratio, min_lr_ratio)
    assert factor == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "cosine", "linear", "constant"),
    [
        # the same rise over the first fifth of ten steps
        (0, 0.5, 0.5, 0.5),
        (1, 1.0, 1.0, 1.0),
        # then down to 0.2, or not
        (2, 1.0, 1.0, 1.0),
        (4, 0.882843, 0.8, 1.0),
        (6, 0.6, 0.6, 1.0),
        (8, 0.317157, 0.4, 1.0),
        (9, 0.230448, 0.3, 1.0),
    ],
)
def test_the_schedules(step: int, cosine: float, linear: float, constant: float) -> None:
    expected: dict[LearningRateSchedule, float]
    expected = {"cosine": cosine, "linear": linear, "constant": constant}
    for schedule, value in expected.items():
        factor = learning_rate_factor(step, 10, 0.2, 0.2, schedule)
        assert factor == pytest.approx(value, abs=1e-6), schedule


@pytest.mark.parametrize("schedule", get_args(LearningRateSchedule))
def test_every_schedule_starts_at_its_peak_and_never_rises_again(
    schedule: LearningRateSchedule,
) -> None:
    factors = [learning_rate_factor(step, 1000, 0.0, 0.3, schedule) for step in range(1000)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    end = 1.0 if schedule == "constant" else 0.3
    assert factors[-1] == pytest.approx(end, abs=1e-3)


def test_a_step_beyond_the_budget_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="step 10 is not one of 10 steps"):
        learning_rate_factor(10, 10, 0.1, 0.1)
