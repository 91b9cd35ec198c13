"""Option letters and their tokens, and benchmarks that cannot be scored."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.digits import digits_benchmark_rows, digits_tokenizer
from nanovlm.data.samples import ImageSlots
from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar import letter_tokens, num_new_tokens, option_letters
from nanovlm.resources import Resources


def benchmark_of(answers: list[str]) -> PreparedBenchmark:
    nothing = torch.empty(0)
    names = ("",) * len(answers)
    return PreparedBenchmark(
        images=nothing,
        slots=ImageSlots.one_each(nothing),
        tokens=nothing,
        offsets=nothing,
        answers=tuple(answers),
        categories=names,
        l2_categories=names,
        indices=tuple(range(100, 100 + len(answers))),
    )


@pytest.mark.parametrize(
    ("answers", "letters"), [("ABDA", "ABCD"), ("A", "A"), ("BB", "AB"), ("AF", "ABCDEF")]
)
def test_letters_go_up_to_the_highest_answer(answers: str, letters: str) -> None:
    assert option_letters(benchmark_of([*answers])) == letters


def test_every_answer_that_is_no_letter_is_named() -> None:
    with pytest.raises(UserError) as caught:
        option_letters(benchmark_of(["A", "b", "", "AB", "Ä", "B", "1", "(A)", "two"]))
    rule = "test_dataset_path: answer must be one capital letter from A, got"
    assert caught.value.messages == (
        f"{rule} 'b' at index 101",
        f"{rule} '' at index 102",
        f"{rule} 'AB' at index 103",
        f"{rule} 'Ä' at index 104",
        f"{rule} '1' at index 106",
        "test_dataset_path: and 2 more answers that are no letter",
    )


def test_an_answer_that_is_missing_is_no_letter() -> None:
    with pytest.raises(UserError, match="got None at index 101"):
        option_letters(benchmark_of(["A", None]))  # type: ignore[list-item]  # a null in the file


def test_a_benchmark_without_questions() -> None:
    with pytest.raises(UserError, match="must hold at least one question"):
        option_letters(benchmark_of([]))


def test_a_letter_is_the_first_token_of_its_answer() -> None:
    tokenizer = digits_tokenizer()
    tokens = letter_tokens(benchmark_of(["A", "D"]), tokenizer)
    assert tokens == {letter: tokenizer.token_to_id(letter) for letter in "ABCD"}


def test_letters_with_one_token_cannot_be_told_apart() -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "A": 1, "B": 2}, unk_token="?"))
    assert letter_tokens(benchmark_of(["C"]), tokenizer) == {"A": 1, "B": 2, "C": 0}
    with pytest.raises(UserError) as caught:
        letter_tokens(benchmark_of(["D"]), tokenizer)
    assert caught.value.messages == (
        "vlm.lm_tokenizer: an answer D must begin with another token than an answer C, or they "
        "cannot be told apart; got 0 for both",
    )


def test_the_longest_wording_that_counts_is_read_whole() -> None:
    assert num_new_tokens(digits_tokenizer(), "ABCD", "lmms-eval-0.7.1") == 5  # as v0.1 reads
    characters = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert num_new_tokens(characters, "ABCD", "lmms-eval-0.7.1") == len("\nThe answer is A")
    assert num_new_tokens(characters, "ABCD") == len("\nThe correct answer is (A)")


def test_a_benchmark_that_cannot_be_scored_is_told_before_the_training(tmp_path: Path) -> None:
    rows = digits_benchmark_rows().select(range(6))
    answers = [*rows["answer"]]
    answers[4] = "A. two"
    rows.remove_columns("answer").add_column("answer", answers).to_parquet(
        str(tmp_path / "mmstar.parquet")
    )
    config = TrainConfig(
        test_dataset_path=str(tmp_path),
        vlm=VLMConfig(lm_tokenizer="builtin:digits", lm_vocab_size=64, vit_img_size=32),
    )
    with pytest.raises(UserError, match=r"got 'A\. two' at index 4"):
        Resources("cpu").benchmark(config)
    Resources("cpu").benchmark(dataclasses.replace(config, test_dataset_path="builtin:digits"))
