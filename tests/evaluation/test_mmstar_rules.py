"""What counts as a right answer, by lmms-eval's rules for MMStar before and since 0.7.2.

The older ones are four:

The answer is lower-cased, stripped, and its line breaks become blanks. It is right if

1. its first character is the letter,
2. it starts with `(` and the letter,
3. it starts with `option ` and the letter,
4. it starts with `the answer is ` and the letter.
"""

import random
import string

import pytest

from nanovlm.evaluation.mmstar_rules import chosen_letter, is_correct, rules_letters

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
    assert is_correct(output, letter, "lmms-eval-0.7.1") is expected


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
        is_right = is_correct(output, letter, "lmms-eval-0.7.1")
        assert is_right is by_the_rules(output, letter), (output, letter)
        right += is_right
    assert 200 < right < 4000  # it is neither all nor nothing


CHOSEN = [
    # it begins with the letter, which is no part of a word; marks at its ends do not count
    ("A", "A"), ("  D\n", "D"), ("B.", "B"), ('"C"', "C"), ("A, since it is red", "A"),
    ("A: the suitcase", "A"), ("A cat is on the book", "A"), ("A or B?", "A"), ("A)", "A"),
    ("A B C D", "A"), ("B2", "B"),
    # it ends with it
    ("I think it is C", "C"), ("so:B", "B"), ("(A) or B", "B"), ("*D", "D"),
    # after a phrase, the last of the first places of all letters
    ("The answer is D", "D"), ("the ANSWER is: D, since", "D"), ("The answer is (A)", "A"),
    ("The correct answer is B.", "B"), ("I choose C and no other", "C"), ("답은 B 입니다", "B"),
    ("The answer is A and not B for sure", "B"), ("The answer is Dog food", "D"),
    ("答案是C吧", "C"), ("My choice is none of A, that much", "A"),
    # set off: in parentheses before a point, a colon, a parenthesis and a blank
    ("see (A) or B. or so", "A"), ("see B. or C: or so", "B"), ("see C: or D) or so", "C"),
    ("see D) or so A or so", "D"), ("so A or so B or so", "B"), ("(A)(B)", "B"),
    ("Option (B)", "B"), ("option B", "B"),
    # anywhere, the last one
    ("Answer", "A"), ("Dog", "D"), ("ABCD", "D"), ("**A**", "A"), ("[A]", "A"), ("Answer: D", "D"),
    # none
    ("", ""), ("   ", ""), (".,!", ""), ("a", ""), ("b)", ""), ("the answer is d", ""),
    ("E", ""), ("1", ""), ("nothing", ""),
]  # fmt: skip


@pytest.mark.parametrize(("output", "letter"), CHOSEN)
def test_the_letter_that_an_answer_names_since_0_7_2(output: str, letter: str) -> None:
    assert chosen_letter(output) == letter
    for other in "ABCD":
        assert is_correct(output, other) is is_correct(output, other, "lmms-eval-0.7.2")
        assert is_correct(output, other, "lmms-eval-0.7.2") is (other == letter)


def test_both_rules_agree_on_letters_alone() -> None:
    for said in "ABCD":
        for right in "ABCD":
            newer, older = (
                is_correct(f" {said}\n", right, rules)
                for rules in ("lmms-eval-0.7.2", "lmms-eval-0.7.1")
            )
            assert newer is older is (said == right)


def test_options_beyond_d_are_looked_for_where_there_are_some() -> None:
    assert rules_letters("B") == rules_letters("D") == "ABCD"
    assert rules_letters("F") == "ABCDEF"
    assert chosen_letter("It is E", rules_letters("E")) == "E"
    assert chosen_letter("It is E", "ABCD") == ""
