"""What counts as a right answer: lmms-eval's rules for MMStar, which it has changed in 0.7.2.

The older rules are those of MMStar's authors: the letter has to come first. The newer ones look for
a letter anywhere and take the one that stands where answers usually do. For a model that answers
with the letter alone both say the same.
"""

from collections.abc import Sequence
from string import ascii_uppercase

from nanovlm.config.schema import MMStarRules

NEWEST_RULES: MMStarRules = "lmms-eval-0.7.2"

LONGEST_WORDING: dict[MMStarRules, str] = {
    "lmms-eval-0.7.1": "\nThe answer is {}",
    "lmms-eval-0.7.2": "\nThe correct answer is ({})",
}
"""Of an answer that is to be read whole; it may come on a new line."""

_OLDER_OPENINGS = ("", "(", "option ", "the answer is ")
"""What may precede the letter."""

_OUTER_MARKS = ",.!?;:'\""
"""Taken off both ends of an answer: each as often as it stands there, one after the other."""
_SIGNS = {"(X)": 6, "X.": 5, "X:": 4, "X)": 3, "X ": 2}
"""How a letter X may be set off, and the weight of each way."""
_PHRASES = (
    *(
        f"{article}{words} is"
        for words in (
            "answer", "correct answer", "best answer", "correct option", "best option", "choice",
            "correct choice",
        )
        for article in ("the ", "")
    ),
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
"""After the first of each, the first occurrence of every letter is a candidate."""
_START, _END, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0


def is_correct(
    output: str, letter: str, rules: MMStarRules = NEWEST_RULES, letters: Sequence[str] = "ABCD"
) -> bool:
    """Return whether `output` answers with `letter`.

    Args:
        letters: of all options, for the newer rules.
    """
    if rules == "lmms-eval-0.7.1":
        return _begins_with(output, letter)
    return chosen_letter(output, letters) == letter.upper()


def rules_letters(highest: str) -> str:
    """Return the letters that an answer is searched for: MMStar's four, or as many as there are."""
    return ascii_uppercase[: max(4, ascii_uppercase.index(highest) + 1)]


def _begins_with(output: str, letter: str) -> bool:
    """Decide by the older rules.

    Case, outer white space and line breaks do not matter. The letter has to come first, or right
    after one of the openings; what follows it is not read, so `A cat` counts as A.
    """
    text = output.lower().strip().replace("\n", " ")
    return any(text.startswith(opening + letter.lower()) for opening in _OLDER_OPENINGS)


def chosen_letter(output: str, letters: Sequence[str] = "ABCD") -> str:
    """Return the letter that an answer names by the newer rules, or nothing.

    Only capital letters count. In order of weight: a letter that begins the answer and is no part
    of a word, one that ends it so, one after a phrase such as `the answer is`, one that is set off.
    Of equals the last one counts; if there is none, the last of these capitals anywhere.
    """
    text = output.strip()
    for mark in _OUTER_MARKS:
        text = text.strip(mark)
    padded, bare = f" {text} ", text.strip()
    found: list[tuple[int, int, str]] = []  # weight, position, letter
    for letter in letters:
        for sign, weight in _SIGNS.items():
            found.append((weight, padded.rfind(sign.replace("X", letter)), letter))
        for end in _phrase_ends(padded):
            found.append((_AFTER_PHRASE, padded.find(letter, end), letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_START, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_END, len(padded), letter))
        found.append((_ANYWHERE, padded.rfind(letter), letter))
    return max((one for one in found if one[1] >= 0), default=(0, 0, ""))[2]


def _phrase_ends(text: str) -> list[int]:
    lower = text.lower()
    found = [(lower.find(phrase), phrase) for phrase in _PHRASES]
    return [position + len(phrase) for position, phrase in found if position >= 0]
