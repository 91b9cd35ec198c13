"""`builtin:digits-tiles`: the digits as conversations for models of tiled images, with a tokenizer.

The scans and the kinds of questions are those of `builtin:digits`, whose benchmark these models
answer as well; so accuracies can be compared. Rows have one turn or two, about one scan or two:
with more turns a model would read the digit from the answers before, and not from the image.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer

from nanovlm.data.digits import (
    END_OF_TEXT,
    KINDS,
    LETTERS,
    NUM_ORDERS,
    TRAINING_FEATURES,
    UNKNOWN,
    Kind,
    Scan,
    as_turn,
    ask,
    image_of,
    split_scans,
    word_tokenizer,
)
from nanovlm.data.text import mmstar_message

BUILTIN_DIGITS_TILES = "builtin:digits-tiles"
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"

_SCANS_A_PAIR = 4
"""Of so many scans two stand in a row together: few, since the benchmark has no question about two
images, and such a row has twice the tiles."""

_LARGER = ("first", "second", "both", "none")
"""Options of which scan shows the larger digit."""


def digits_tiles_training_rows() -> datasets.Dataset:
    """Return rows in FineVision's columns `images` and `texts`.

    Of each scan six rows, which together ask a question of each kind, the shuffled one under
    several orders, and for the digit itself; of two scans in four a row that compares them.
    """
    scans, _ = split_scans()
    return datasets.Dataset.from_list([*_rows(scans)], features=TRAINING_FEATURES)


def digits_tiles_tokenizer() -> Tokenizer:
    """Return a word-level tokenizer of the training text, as `digits_tokenizer` is one.

    The ids 0 and 1 are its, 2 and 3 begin and end a message; what stands for images comes beside.
    """
    special = [END_OF_TEXT, UNKNOWN, MESSAGE_START, MESSAGE_END]
    return word_tokenizer(_vocabulary_text(), special)


def _rows(scans: list[Scan]) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(3)
    recognition, *others = KINDS
    for number, scan in enumerate(scans):
        # A model learns last to look an answer up among shuffled options. How early decides what
        # it reaches, and that takes rows in which no turn before tells the digit.
        for _ in range(NUM_ORDERS):
            yield _row([scan], _choice(recognition, scan, rng))
        yield _row([scan], _open(recognition.question, scan), _choice(recognition, scan, rng))
        first, second, third = np.roll(np.arange(len(others)), number)
        yield _row([scan], _choice(others[first], scan, rng))
        yield _row([scan], *(_choice(others[i], scan, rng) for i in (second, third)))
    for one, another in zip(scans[::_SCANS_A_PAIR], scans[1::_SCANS_A_PAIR], strict=False):
        asked = "Which digit does the second scan show?"
        yield _row([one, another], _larger(one, another, rng), _open(asked, another))


def _row(scans: list[Scan], *turns: dict[str, str]) -> dict[str, Any]:
    return {"images": [image_of(scan) for scan in scans], "texts": turns}


def _open(question: str, scan: Scan) -> dict[str, str]:
    return as_turn(question, str(scan.digit), "open")


def _choice(kind: Kind, scan: Scan, rng: np.random.Generator) -> dict[str, str]:
    question, letter = ask(kind, scan.digit, str(rng.choice(list(LETTERS))), rng)
    return as_turn(mmstar_message(question), letter, kind.categories[1])


def _larger(first: Scan, second: Scan, rng: np.random.Generator) -> dict[str, str]:
    """Return a turn with the options in any order; `both` where no digit is larger."""
    right = "first" if first.digit > second.digit else "second"
    if first.digit == second.digit:
        right = "both"
    options = [str(option) for option in rng.permutation(_LARGER)]
    inline = ", ".join(f"{name}: {option}" for name, option in zip(LETTERS, options, strict=True))
    question = f"Which scan shows the larger digit?\nOptions: {inline}"
    return as_turn(mmstar_message(question), LETTERS[options.index(right)], "comparison")


def _vocabulary_text() -> Iterator[str]:
    yield "<image: 0> <image: 1>"
    scans, _ = split_scans()
    for row in _rows(scans):
        for turn in row["texts"]:
            yield f"{turn['user']} {turn['assistant']}"
