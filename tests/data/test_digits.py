"""The data that ships: columns, balance, and no scan in both parts."""

import re
from collections import Counter

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits
from tokenizers import Tokenizer

from nanovlm.data.digits import (
    INSTRUCTION,
    KINDS,
    LETTERS,
    digits_benchmark_rows,
    digits_tokenizer,
    digits_training_rows,
    load_scans,
)
from nanovlm.data.text import mmstar_prompt, training_prompt

SCANS = load_digits()
DIGIT_OF_SCAN = {
    np.round(image * 255 / 16).astype(np.uint8).tobytes(): int(digit)
    for image, digit in zip(SCANS.images, SCANS.target, strict=True)
}


@pytest.fixture(scope="module")
def training() -> datasets.Dataset:
    return digits_training_rows()


@pytest.fixture(scope="module")
def benchmark() -> datasets.Dataset:
    return digits_benchmark_rows()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return digits_tokenizer()


def scan_of(image: object) -> bytes:
    """Return the 8 x 8 scanned pixels of a served image."""
    pixels = np.asarray(image)
    scale = len(pixels) // 8
    assert (pixels == pixels[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all()
    return pixels[::scale, ::scale].tobytes()


def parse_options(question: str) -> tuple[str, list[str]]:
    """Return what is asked, and the inline options in the order of their letters."""
    asked, inline = question.split("\nOptions: ")
    names, options = zip(*(part.split(": ") for part in inline.split(", ")), strict=True)
    assert "".join(names) == LETTERS
    return asked, list(options)


def test_the_scans_are_those_of_scikit_learn() -> None:
    data, (ink, digits) = load_digits(), load_scans()
    assert np.array_equal(ink, data.images) and np.array_equal(digits, data.target)


def test_training_columns_are_those_of_the_cauldron(training: datasets.Dataset) -> None:
    assert training.features == datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List(
                {key: datasets.Value("string") for key in ("user", "assistant", "source")}
            ),
        }
    )
    assert all(len(images) == 1 for images in training["images"])


def test_benchmark_columns_are_those_of_mmstar(benchmark: datasets.Dataset) -> None:
    text = datasets.Value("string")
    assert benchmark.features == datasets.Features(
        {
            "index": datasets.Value("int64"),
            "question": text,
            "image": datasets.Image(),
            "answer": text,
            "category": text,
            "l2_category": text,
            "meta_info": {"source": text, "split": text, "image_path": text},
        }
    )
    assert list(benchmark["index"]) == list(range(len(benchmark)))


def test_every_scan_is_served_in_one_part_only(
    training: datasets.Dataset, benchmark: datasets.Dataset
) -> None:
    trained = [scan_of(images[0]) for images in training["images"]]
    asked = {scan_of(image) for image in benchmark["image"]}
    assert not asked & set(trained)
    assert len(set(trained)) == len(trained)
    assert asked | set(trained) == set(DIGIT_OF_SCAN)
    assert set(Counter(DIGIT_OF_SCAN[scan] for scan in asked).values()) == {36}


def test_each_letter_is_right_equally_often_in_each_kind(benchmark: datasets.Dataset) -> None:
    assert len(KINDS) >= 3
    assert 1_000 <= len(benchmark) <= 1_500
    for kind in KINDS:
        answers = Counter(
            row["answer"]
            for row in benchmark.remove_columns("image")
            if (row["category"], row["l2_category"]) == kind.categories
        )
        assert set(answers) == set(LETTERS)
        assert len(set(answers.values())) == 1


def test_every_benchmark_letter_names_the_right_option(benchmark: datasets.Dataset) -> None:
    kinds = {kind.question: kind for kind in KINDS}
    for row in benchmark:
        asked, options = parse_options(row["question"])
        kind = kinds[asked]
        digit = DIGIT_OF_SCAN[scan_of(row["image"])]
        assert options[LETTERS.index(row["answer"])] == kind.answer(digit)
        assert len(set(options)) == len(options)
        assert set(options) <= set(kind.options)


def test_every_training_answer_is_right(training: datasets.Dataset) -> None:
    kinds = {kind.question: kind for kind in KINDS}
    for row in training:
        digit = DIGIT_OF_SCAN[scan_of(row["images"][0])]
        for turn in row["texts"]:
            if "Options" not in turn["user"]:
                assert turn["assistant"] == str(digit)
                continue
            asked, options = parse_options(turn["user"].removesuffix(f"\n{INSTRUCTION}"))
            assert options[LETTERS.index(turn["assistant"])] == kinds[asked].answer(digit)


def test_orders_are_shuffled_where_they_should_be(benchmark: datasets.Dataset) -> None:
    orders: dict[str, set[tuple[str, ...]]] = {}
    for question in benchmark["question"]:
        asked, options = parse_options(question)
        orders.setdefault(asked, set()).add(tuple(options))
    for kind in KINDS:
        if kind.shuffled:
            assert len(orders[kind.question]) > 100
        else:
            assert orders[kind.question] == {kind.options}
    assert {kind.shuffled for kind in KINDS} == {True, False}


def test_the_letter_says_nothing_about_the_digit_in_a_shuffled_kind(
    benchmark: datasets.Dataset,
) -> None:
    shuffled = {kind.question for kind in KINDS if kind.shuffled}
    right = [
        (options[LETTERS.index(answer)], answer)
        for (asked, options), answer in zip(
            map(parse_options, benchmark["question"]), benchmark["answer"], strict=True
        )
        if asked in shuffled
    ]
    counts = Counter(right)
    best_guess = sum(max(counts[d, letter] for letter in LETTERS) for d in map(str, range(10)))
    assert best_guess / len(right) < 0.4


def test_tokenizer_starts_with_end_of_text_and_unknown(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert tokenizer.encode("zebra").ids == [1]
    assert tokenizer.decode([0]) == ""


def test_tokenizer_knows_every_word_of_both_parts(
    tokenizer: Tokenizer, training: datasets.Dataset, benchmark: datasets.Dataset
) -> None:
    text = [mmstar_prompt(question) for question in benchmark["question"]]
    text += [
        f"{training_prompt(turn['user'])} {turn['assistant']}"
        for turns in training["texts"]
        for turn in turns
    ]
    assert all(1 not in encoding.ids for encoding in tokenizer.encode_batch(text))


def test_tokenizer_round_trip(tokenizer: Tokenizer, benchmark: datasets.Dataset) -> None:
    for question in benchmark["question"][:400]:
        prompt = mmstar_prompt(question)
        ids = tokenizer.encode(prompt).ids
        text = tokenizer.decode(ids)
        assert tokenizer.encode(text).ids == ids
        assert text.split() == re.split(r"[\s,:]+", prompt.removesuffix(":"))
    assert [tokenizer.decode(tokenizer.encode(letter).ids) for letter in LETTERS] == list(LETTERS)


def test_training_and_benchmark_ask_in_the_same_tokens(tokenizer: Tokenizer) -> None:
    question = "Which digit is this?\nOptions: A: 0, B: 1, C: 2, D: 3"
    trained = training_prompt(f"{question}\n{INSTRUCTION}")
    assert tokenizer.encode(trained).ids == tokenizer.encode(mmstar_prompt(question)).ids
