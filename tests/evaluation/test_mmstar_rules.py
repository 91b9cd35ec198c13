"""What counts as a right answer: lmms-eval's four published rules for MMStar.

The answer is lower-cased, stripped, and its line breaks become blanks. It is right if

1. its first character is the letter,
2. it starts with `(` and the letter,
3. it starts with `option ` and the letter,
4. it starts with `the answer is ` and the letter.
"""

import random
import string

import pytest

from nanovlm.evaluation.mmstar_result import is_correct

TABLE = [
    # 1. the letter comes first, whatever follows
    ("A", "A", True),
    ("B", "B", True),
    ("C", "C", True),
    ("D", "D", True),
    ("a", "A", True),
    ("A", "a", True),
    ("A.", "A", True),
    ("A)", "A", True),
    ("A:", "A", True),
    ("A: a suitcase", "A", True),
    ("A, since it is red", "A", True),
    ("A cat is on the book", "A", True),
    ("a dog", "A", True),
    ("An apple", "A", True),
    ("AThe", "A", True),  # what v0.1 makes of `A<eos>The`
    ("AA", "A", True),
    ("A B C D", "A", True),
    ("A or B", "B", False),
    ("  A\n", "A", True),
    ("\tA", "A", True),
    ("\n\nD", "D", True),
    ("A\nB", "A", True),
    ("B", "A", False),
    ("BA", "A", False),
    ("E", "A", False),
    # 2. in parentheses, closed or not
    ("(A)", "A", True),
    ("(c) a dog", "C", True),
    ("(A", "A", True),
    ("(A cat", "A", True),
    (" (B)", "B", True),
    ("(B)", "A", False),
    ("( A)", "A", False),
    ("((A))", "A", False),
    ("[A]", "A", False),
    (")A", "A", False),
    # 3. after "option"
    ("Option B", "B", True),
    ("option b.", "B", True),
    ("OPTION\nB", "B", True),
    ("Option C: the cat", "C", True),
    ("option A", "B", False),
    ("option  B", "B", False),
    ("Option (B)", "B", False),
    ("OptionB", "B", False),
    ("options B", "B", False),
    ("The option B", "B", False),
    ("Option", "O", True),  # the first character, as in rule 1
    # 4. after "the answer is"
    ("The answer is D", "D", True),
    ("the answer is d, since", "D", True),
    ("The answer\nis D", "D", True),
    ("THE ANSWER IS D.", "D", True),
    ("The answer is Dog", "D", True),
    ("The answer is A", "D", False),
    ("The answer is: D", "D", False),
    ("The answer is (D)", "D", False),
    ("The answer  is D", "D", False),
    ("The correct answer is D", "D", False),
    ("So the answer is D", "D", False),
    ("The answer is option D", "D", False),
    # the letter stands elsewhere, or nowhere
    ("Answer: D", "D", False),  # how the_cauldron answers its multiple-choice questions
    ("Answer: A", "A", True),  # by rule 1, as any word with an A would
    ("I think A", "A", False),
    ("It is A", "A", False),
    ("*A*", "A", False),
    ("**A**", "A", False),
    ('"A"', "A", False),
    ("1. A", "A", False),
    ("", "A", False),
    ("   ", "A", False),
    ("1", "A", False),
    ("the answer is", "A", False),
    ("the answer is ", "A", False),
    ("option ", "A", False),
    ("(", "A", False),
    # traps of the first character, which the rules have and so have we
    ("Cannot say", "C", True),
    ("Dog", "D", True),
    ("Both", "B", True),
    ("The answer is D", "T", True),
]


@pytest.mark.parametrize(("output", "letter", "expected"), TABLE)
def test_is_correct(output: str, letter: str, expected: bool) -> None:
    assert is_correct(output, letter) is expected


def by_the_rules(output: str, letter: str) -> bool:
    """The four rules again, by the places of characters."""
    said = " ".join(output.lower().strip().split("\n"))
    place_of_letter = {"": 0, "(": 1, "option ": 7, "the answer is ": 14}
    return any(
        said[:place] == opening and said[place : place + 1] == letter.lower()
        for opening, place in place_of_letter.items()
    )


def test_the_table_is_by_the_rules() -> None:
    assert len(TABLE) >= 60
    assert [row for row in TABLE if by_the_rules(row[0], row[1]) is not row[2]] == []


def test_generated_answers_are_scored_by_the_rules() -> None:
    rng = random.Random(0)
    openings = ("", "", " ", "\n", "(", "option ", "Option\n", "the answer is ", "The answer is\n")
    pieces = (
        *"AbAbAbAbAbAbAbAb",
        *openings,
        *string.punctuation,
        "cat",
        "the",
        "answer",
        "is",
        "option",
    )
    right = 0
    for _ in range(5000):
        output = rng.choice(openings) + "".join(rng.choices(pieces, k=rng.randint(0, 4)))
        letter = rng.choice("AB")
        assert is_correct(output, letter) is by_the_rules(output, letter), (output, letter)
        right += is_correct(output, letter)
    assert 200 < right < 4000  # it is neither all nor nothing
