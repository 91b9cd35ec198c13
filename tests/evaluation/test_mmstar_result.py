"""How answers become numbers and lines; no model takes part."""

import json
import math
from typing import Any

import pytest

from nanovlm.evaluation.mmstar_result import MMStarResult


def result_of(*items: tuple[str, str, bool], **more: Any) -> MMStarResult:
    categories, axes, correct = zip(*items, strict=True)
    number = len(items)
    values: dict[str, Any] = {
        "indices": tuple(range(number)),
        "answers": ("A",) * number,
        "outputs": ("A",) * number,
        "correct": correct,
        "letters": ("A",) * number,
        "letter_nlls": (0.0,) * number,
        "categories": categories,
        "l2_categories": axes,
    }
    return MMStarResult(**(values | more))


ITEMS = (
    ("math", "geometry", True),
    ("math", "geometry", True),
    ("math", "geometry", False),
    ("math", "statistics", False),
    ("perception", "emotion", True),
)


def test_metrics() -> None:
    result = result_of(
        *ITEMS,
        answers=tuple("ABCDA"),
        letters=tuple("ABBBB"),
        letter_nlls=(0.5, 0.25, 1.0, 2.0, 0.0),
    )
    assert result.metrics() == {
        "mmstar_accuracy": 3 / 5,
        "mmstar_standard_error": pytest.approx(math.sqrt(0.6 * 0.4 / 5)),
        "mmstar_num_items": 5.0,
        "mmstar_macro_accuracy": pytest.approx((2 / 3 + 0 + 1) / 3),  # axes, not capabilities
        "mmstar_letter_accuracy": 2 / 5,
        "mmstar_letter_nll": 0.75,
        "mmstar_accuracy/math": 2 / 4,
        "mmstar_accuracy/math/geometry": 2 / 3,
        "mmstar_accuracy/math/statistics": 0.0,
        "mmstar_accuracy/perception": 1.0,
        "mmstar_accuracy/perception/emotion": 1.0,
    }
    assert all(type(value) is float for value in result.metrics().values())


def test_lines() -> None:
    result = result_of(
        *ITEMS[:2],
        indices=(7, 3),
        answers=("B", "A"),
        outputs=("A", "é\n"),
        correct=(False, True),
        letters=("A", "B"),
        letter_nlls=(1.5, 0.1),
    )
    first, second = result.json_lines().splitlines()
    assert first == (
        '{"index": 7, "answer": "B", "output": "A", "correct": false, '
        '"letter": "A", "letter_nll": 1.5}'
    )
    assert json.loads(second) == {
        "index": 3, "answer": "A", "output": "é\n", "correct": True, "letter": "B",
        "letter_nll": 0.1,
    }  # fmt: skip
