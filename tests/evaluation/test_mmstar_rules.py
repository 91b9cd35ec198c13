"""What counts as a right answer, and how answers become numbers; no model takes part."""

import math

import pytest

from nanovlm.evaluation.mmstar import MMStarResult, equal_length_batches, is_correct


@pytest.mark.parametrize(
    ("output", "letter", "expected"),
    [
        # the letter comes first, whatever follows
        ("A", "A", True),
        ("a", "A", True),
        ("A", "a", True),
        ("A.", "A", True),
        ("A: a suitcase", "A", True),
        ("A cat is on the book", "A", True),
        ("AThe", "A", True),
        ("  A\n", "A", True),
        ("\n\nD", "D", True),
        ("B", "A", False),
        ("BA", "A", False),
        # in parentheses, closed or not
        ("(A)", "A", True),
        ("(c) a dog", "C", True),
        ("(A", "A", True),
        ("(B)", "A", False),
        ("( A)", "A", False),
        ("((A))", "A", False),
        # after "option"
        ("Option B", "B", True),
        ("option b.", "B", True),
        ("OPTION\nB", "B", True),
        ("option  B", "B", False),
        ("Option (B)", "B", False),
        ("OptionB", "B", False),
        ("options B", "B", False),
        # after "the answer is"
        ("The answer is D", "D", True),
        ("the answer is d, since", "D", True),
        ("The answer\nis D", "D", True),
        ("The answer is: D", "D", False),
        ("The answer is (D)", "D", False),
        ("The correct answer is D", "D", False),
        ("Answer: D", "D", False),
        # the letter stands elsewhere, or nowhere
        ("I think A", "A", False),
        ("*A*", "A", False),
        ("", "A", False),
        ("   ", "A", False),
        ("1", "A", False),
        ("the answer is", "A", False),
        ("(", "A", False),
        # traps of the first letter, which the rules have and so have we
        ("Cannot say", "C", True),
        ("Dog", "D", True),
    ],
)
def test_is_correct(output: str, letter: str, expected: bool) -> None:
    assert is_correct(output, letter) is expected


def result_of(*items: tuple[str, str, bool]) -> MMStarResult:
    categories, axes, correct = zip(*items, strict=True)
    return MMStarResult(
        outputs=("A",) * len(items), correct=correct, categories=categories, l2_categories=axes
    )


def test_metrics() -> None:
    result = result_of(
        ("math", "geometry", True),
        ("math", "geometry", True),
        ("math", "geometry", False),
        ("math", "statistics", False),
        ("perception", "emotion", True),
    )
    assert result.metrics() == {
        "mmstar_accuracy": 3 / 5,
        "mmstar_standard_error": pytest.approx(math.sqrt(0.6 * 0.4 / 5)),
        "mmstar_num_items": 5.0,
        "mmstar_macro_accuracy": pytest.approx((2 / 3 + 0 + 1) / 3),  # axes, not capabilities
        "mmstar_accuracy/math": 2 / 4,
        "mmstar_accuracy/math/geometry": 2 / 3,
        "mmstar_accuracy/math/statistics": 0.0,
        "mmstar_accuracy/perception": 1.0,
        "mmstar_accuracy/perception/emotion": 1.0,
    }
    assert all(type(value) is float for value in result.metrics().values())


def test_equal_length_batches() -> None:
    batches = equal_length_batches([7, 5, 7, 7, 5, 9], batch_size=2)
    assert batches == [[1, 4], [0, 2], [3], [5]]
