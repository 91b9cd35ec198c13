"""Prompts and turns as token ids."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nanovlm.data.text import (
    RowText,
    encode,
    encode_turns,
    mmstar_prompt,
    training_answer,
    training_prompt,
)
from nanovlm.errors import UserError

EOS = 9
WORDS = ["Question:", "What?", "Answer:", "a", "cat"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_prompts_are_worded_as_in_nanovlm() -> None:
    assert training_prompt("What?") == "Question: What? Answer:"
    assert mmstar_prompt("What?") == ("Question: What? \nAnswer only with the letter! \nAnswer:")


def row_text(tokenizer: Tokenizer, *turns: tuple[str, str], max_length: int = 79) -> RowText:
    """Return the samples of one row of these turns."""
    row = [{"user": user, "assistant": assistant} for user, assistant in turns]
    [text] = encode_turns(tokenizer, [row], EOS, max_length)
    return text


def test_a_turn_is_prompt_answer_and_eos(tokenizer: Tokenizer) -> None:
    text = row_text(tokenizer, ("What?", "a cat"))
    assert (text.tokens, text.prompt_lengths) == ([[0, 1, 2, 3, 4, EOS]], [3])


def test_the_answer_does_not_melt_into_the_prompt(tokenizer: Tokenizer) -> None:
    # Joined without a space, `Answer:a` would be one unknown word.
    assert row_text(tokenizer, ("What?", "a")).tokens == [[0, 1, 2, 3, EOS]]


@pytest.mark.parametrize(
    ("assistant", "answer"),
    [
        ("Answer: D", "D"),
        ("Answer:D", "D"),
        ("Answer: The answer: 4", "The answer: 4"),
        ("D", "D"),
        ("Answering: yes", "Answering: yes"),
        (" no", " no"),
        ("It is 4. Answer: 4", "It is 4. Answer: 4"),
    ],
)
def test_an_answer_does_not_repeat_the_end_of_the_prompt(assistant: str, answer: str) -> None:
    assert training_answer(assistant) == answer


def test_the_end_of_the_prompt_is_not_encoded_twice(tokenizer: Tokenizer) -> None:
    assert row_text(tokenizer, ("What?", "Answer: cat")).tokens == [[0, 1, 2, 4, EOS]]


def test_an_over_long_turn_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    turns = ("What?", "a"), ("What?", "a cat"), ("What?", "cat")
    text = row_text(tokenizer, *turns, max_length=5)
    assert text.tokens == [[0, 1, 2, 3, EOS], [0, 1, 2, 4, EOS]]
    assert (text.prompt_lengths, text.num_turns, text.num_over_long) == ([3, 3], 3, 1)
    assert row_text(tokenizer, *turns, max_length=6).num_over_long == 0


def test_prompts_alone(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, ["a cat", "What?"]) == [[3, 4], [1]]


def test_a_text_with_a_word_that_the_tokenizer_has_nothing_for() -> None:
    tokenizer = Tokenizer(models.WordLevel({"cat": 0}, unk_token="?"))
    with pytest.raises(
        UserError, match=r"vlm\.lm_tokenizer: cannot encode a text: .*\[UNK\] token"
    ):
        encode(tokenizer, ["cat", "dog"])
