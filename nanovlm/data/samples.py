"""The text of one sample: prompts, and a turn as token ids. Pure functions, no data set."""

from typing import NamedTuple

from tokenizers import Tokenizer


def training_prompt(user: str) -> str:
    """Return what precedes the answer in training (nanoVLM v0.1's wording)."""
    return f"Question: {user} Answer:"


def mmstar_prompt(question: str) -> str:
    """Return what precedes the answer in the benchmark (nanoVLM v0.1's wording and spacing)."""
    return f"Question: {question} \nAnswer only with the letter! \nAnswer:"


class EncodedTurn(NamedTuple):
    """A question and its answer as one sequence: prompt, answer, EOS."""

    tokens: list[int]
    num_prompt_tokens: int
    """The first so many tokens are given; the ones after it (answer and EOS) are learnt."""


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt alone, with nothing added in front or behind."""
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    return ids


def encode_turn(
    tokenizer: Tokenizer, user: str, assistant: str, eos_token_id: int, max_length: int
) -> EncodedTurn | None:
    """Return one turn as token ids, or None if prompt, answer and EOS exceed `max_length`.

    Prompt and answer are encoded apart: generation starts from the prompt alone, so training must
    not see a token that joins the prompt's end with the answer's beginning.
    """
    prompt = encode_prompt(tokenizer, training_prompt(user))
    answer = tokenizer.encode(assistant, add_special_tokens=False).ids
    tokens = [*prompt, *answer, eos_token_id]
    return EncodedTurn(tokens, len(prompt)) if len(tokens) <= max_length else None
