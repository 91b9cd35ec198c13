"""`builtin:digits`: questions about real scans of handwritten digits, in files that pip installed.

scikit-learn bundles 1,797 scans of 8 x 8 grey pixels (`load_digits`, from the UCI repository). They
are served in the columns of the_cauldron for training and in those of MMStar for the benchmark, so
that everything that works on them works on the real data sets too. The split is fixed and no scan
is in both parts. Nothing here depends on anything but the scans: the same rows on every machine.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from nanovlm.data.text import mmstar_prompt, training_prompt

BUILTIN_DIGITS = "builtin:digits"
LETTERS = "ABCD"
INSTRUCTION = "Answer only with the letter!"
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"

IMAGE_SIDE = 32
"""Side of the served images in pixels; each scanned pixel becomes a square of 4 x 4."""
NUM_BENCHMARK_SCANS_PER_DIGIT = 36
NUM_ORDERS = 3
"""Turns of a shuffled kind in a training row: the same question under several orders."""

_TEXT = datasets.Value("string")
TRAINING_FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List({"user": _TEXT, "assistant": _TEXT, "source": _TEXT}),
    }
)
BENCHMARK_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "question": _TEXT,
        "image": datasets.Image(),
        "answer": _TEXT,
        "category": _TEXT,
        "l2_category": _TEXT,
        "meta_info": {"source": _TEXT, "split": _TEXT, "image_path": _TEXT},
    }
)


@dataclass(frozen=True)
class Kind:
    """A kind of question: what is asked, what can be answered, and in which order."""

    categories: tuple[str, str]
    """`category` and `l2_category` in the benchmark."""
    question: str
    answer: Callable[[int], str]
    """The right option for a digit."""
    options: tuple[str, ...]
    """All answers there are; of more than four, three wrong ones are drawn for each question."""
    shuffled: bool = False
    """False lists the four options always in this order."""


KINDS = (
    Kind(
        ("fine-grained perception", "recognition"),
        "Which digit is this?",
        answer=str,
        options=tuple("0123456789"),
        shuffled=True,
    ),
    Kind(
        ("instance reasoning", "cross-instance relation reasoning"),
        "Which range does the digit lie in?",
        answer=lambda digit: ("0-2", "3-4", "5-6", "7-9")[(digit > 2) + (digit > 4) + (digit > 6)],
        options=("0-2", "3-4", "5-6", "7-9"),
    ),
    Kind(
        ("logical reasoning", "common reasoning"),
        "Which group does the digit belong to?",
        answer=lambda digit: ("low", "high")[digit > 4] + ("-even", "-odd")[digit % 2],
        options=("low-even", "low-odd", "high-even", "high-odd"),
    ),
    Kind(
        ("math", "numeric commonsense and calculation"),
        "What remains when dividing the digit by four?",
        answer=lambda digit: str(digit % 4),
        options=tuple("0123"),
    ),
)
# Short wordings and options of one word: a step on CPU costs in proportion to the longest prompt.


def digits_training_rows() -> datasets.Dataset:
    """Return one row a scan, in the_cauldron's columns: its image, and turns of every kind.

    Besides, each row asks for the digit itself without options, and asks the shuffled kinds under
    several orders of the options.
    """
    scans, _ = split_scans()
    images = [[image_of(scan)] for scan in scans]
    columns = {"images": images, "texts": list(_training_texts(scans))}
    return datasets.Dataset.from_dict(columns, features=TRAINING_FEATURES)


def digits_benchmark_rows() -> datasets.Dataset:
    """Return one row a question, in MMStar's columns; within a kind all letters are equally often
    right, so that guessing gives 0.25.

    A kind asks about as many of the scans as that allows: in a fixed order of the options the
    digit decides the letter.
    """
    _, scans = split_scans()
    rng = np.random.default_rng(2)
    rows = [row for kind in KINDS for row in _benchmark_rows(kind, scans, rng)]
    indexed = [{"index": index, **row} for index, row in enumerate(rows)]
    return datasets.Dataset.from_list(indexed, features=BENCHMARK_FEATURES)


def digits_tokenizer() -> Tokenizer:
    """Return a word-level tokenizer of the training text; id 0 ends a text, id 1 is unknown.

    White space, commas and colons only separate words: `A: 3, B: 7` is `A`, `3`, `B`, `7`. So the
    letter of an option is the same token as the letter of an answer, and prompts are short.
    Decoding puts one space between words.
    """
    return word_tokenizer(_vocabulary_text(), [END_OF_TEXT, UNKNOWN])


def word_tokenizer(texts: Iterator[str], special_tokens: list[str]) -> Tokenizer:
    """Return a tokenizer of the words in `texts`, as `digits_tokenizer` divides them.

    Args:
        special_tokens: the tokens with the first ids, `UNKNOWN` among them.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s,:]+"), "removed")
    trainer = trainers.WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Scan:
    """A scanned digit."""

    number: int
    """Its index in `load_scans`."""
    pixels: np.ndarray
    """uint8[8, 8], 0 is paper and 255 is ink."""
    digit: int


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return what `sklearn.datasets.load_digits` does, without the import of scikit-learn, which
    takes a second and 110 MB in every process.

    Returns:
        The ink, float64[1797, 8, 8] of 0 to 16, and the digits that are shown, int64[1797].
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "it is required"
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def split_scans() -> tuple[list[Scan], list[Scan]]:
    """Return the scans of training and benchmark; of each digit the benchmark has equally many."""
    ink, digits = load_scans()
    pixels = np.round(ink * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    scans = [Scan(int(i), pixels[i], int(digits[i])) for i in order]
    training: list[Scan] = []
    benchmark: list[Scan] = []
    in_benchmark = Counter[int]()
    for scan in scans:
        is_full = in_benchmark[scan.digit] == NUM_BENCHMARK_SCANS_PER_DIGIT
        in_benchmark[scan.digit] += not is_full
        (training if is_full else benchmark).append(scan)
    return training, benchmark


def image_of(scan: Scan) -> dict[str, Any]:
    """Return a scan as `datasets` stores an image: PNG bytes and a file name."""
    scale = IMAGE_SIDE // len(scan.pixels)
    pixels = scan.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return {"bytes": file.getvalue(), "path": _image_name(scan)}


def _image_name(scan: Scan) -> str:
    return f"scan-{scan.number:04}.png"


def ask(kind: Kind, digit: int, letter: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question with inline options, and its letter.

    In a shuffled kind `letter` is that of the right option.
    """
    right = kind.answer(digit)
    options: Sequence[str] = kind.options
    if kind.shuffled:
        wrong = [option for option in kind.options if option != right]
        drawn = [str(option) for option in rng.choice(wrong, len(LETTERS) - 1, replace=False)]
        drawn.insert(LETTERS.index(letter), right)
        options = drawn
    inline = ", ".join(f"{name}: {option}" for name, option in zip(LETTERS, options, strict=True))
    return f"{kind.question}\nOptions: {inline}", LETTERS[options.index(right)]


def _training_texts(scans: Iterable[Scan]) -> Iterator[list[dict[str, str]]]:
    """Yield the turns of each scan."""
    rng = np.random.default_rng(1)
    for scan in scans:
        turns = [as_turn(KINDS[0].question, str(scan.digit), "open")]
        for kind in KINDS:
            for _ in range(NUM_ORDERS if kind.shuffled else 1):
                question, letter = ask(kind, scan.digit, str(rng.choice(list(LETTERS))), rng)
                turns.append(as_turn(f"{question}\n{INSTRUCTION}", letter, kind.categories[1]))
        yield turns


def as_turn(user: str, assistant: str, source: str) -> dict[str, str]:
    return {"user": user, "assistant": assistant, "source": f"digits: {source}"}


def _benchmark_rows(
    kind: Kind, scans: Iterable[Scan], rng: np.random.Generator
) -> list[dict[str, Any]]:
    by_letter: dict[str, list[dict[str, Any]]] = {letter: [] for letter in LETTERS}
    for i, scan in enumerate(scans):
        question, letter = ask(kind, scan.digit, LETTERS[i % len(LETTERS)], rng)
        by_letter[letter].append(
            {
                "question": question,
                "image": image_of(scan),
                "answer": letter,
                "category": kind.categories[0],
                "l2_category": kind.categories[1],
                "meta_info": {
                    "source": "scikit-learn load_digits",
                    "split": "benchmark",
                    "image_path": _image_name(scan),
                },
            }
        )
    # The rarest letter decides how many questions there are of each.
    return [row for four in zip(*by_letter.values(), strict=False) for row in four]


def _vocabulary_text() -> Iterator[str]:
    scans, _ = split_scans()
    yield mmstar_prompt("")
    for turns in _training_texts(scans):
        for turn in turns:
            yield f"{training_prompt(turn['user'])} {turn['assistant']}"
