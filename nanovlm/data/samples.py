"""The text of one sample: prompts, and a turn as token ids. Pure functions, no data set."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from nanovlm.errors import UserError

_PROMPT_END = "Answer:"
_TEXTS_AT_ONCE = 10_000  # an encoding holds far more than the ids that are kept


def training_prompt(user: str) -> str:
    """Return what precedes the answer in training (nanoVLM v0.1's wording)."""
    return f"Question: {user} {_PROMPT_END}"


def mmstar_prompt(question: str) -> str:
    """Return what precedes the answer in the benchmark (nanoVLM v0.1's wording and spacing)."""
    return f"Question: {question} \nAnswer only with the letter! \n{_PROMPT_END}"


def training_answer(assistant: str) -> str:
    """Return what is learnt behind the prompt.

    The multiple-choice sets of the_cauldron answer `Answer: D`. The prompt ends with that word
    already; a model that learnt to repeat it would score near zero by MMStar's rules, which read
    the letter first.
    """
    answer = assistant.removeprefix(_PROMPT_END)
    return assistant if answer == assistant else answer.lstrip()


class EncodedTurn(NamedTuple):
    """A question and its answer as one sequence: prompt, answer, EOS."""

    tokens: list[int]
    num_prompt_tokens: int
    """The first so many tokens are given; the ones after it (answer and EOS) are learnt."""


def encode_turns(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], eos_token_id: int, max_length: int
) -> list[EncodedTurn | None]:
    """Return each turn (user, assistant) as token ids, or None if it exceeds `max_length` tokens.

    Prompt and answer are encoded apart: generation starts from the prompt alone, so training must
    not see a token that joins the prompt's end with the answer's beginning.
    """
    prompts = _encode_batch(tokenizer, [training_prompt(user) for user, _ in turns])
    answers = _encode_batch(tokenizer, [training_answer(answer) for _, answer in turns])
    encoded = (
        EncodedTurn([*prompt, *answer, eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    return [turn if len(turn.tokens) <= max_length else None for turn in encoded]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of prompts alone, with nothing added in front or behind."""
    return _encode_batch(tokenizer, prompts)


def _encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        try:
            encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        except Exception as error:  # the library raises no other type
            raise UserError(f"vlm.lm_tokenizer: cannot encode a text: {error}") from error
        ids += [e.ids for e in encoded]
    return ids
