"""The letters of a benchmark's options, and the tokens that stand for them."""

from string import ascii_uppercase

from tokenizers import Tokenizer

from nanovlm.data.tensors import PreparedBenchmark
from nanovlm.errors import UserError

_LETTERS = (*ascii_uppercase,)
_MAX_LISTED = 5


def option_letters(benchmark: PreparedBenchmark) -> str:
    """Return the letters of the options: from A to the highest one that is an answer.

    Raises:
        UserError: there is no question, or an answer is no letter; lists the first ones.
    """
    wrong = [
        f"test_dataset_path: answer must be one capital letter from A, got {answer!r} "
        f"at index {index}"
        for index, answer in zip(benchmark.indices, benchmark.answers, strict=True)
        if answer not in _LETTERS
    ]
    if wrong:
        more = len(wrong) - _MAX_LISTED
        tail = [f"test_dataset_path: and {more} more answers that are no letter"]
        raise UserError(*wrong[:_MAX_LISTED], *(tail if more > 0 else []))
    if not benchmark.answers:
        raise UserError("test_dataset_path: must hold at least one question, got none")
    return ascii_uppercase[: ascii_uppercase.index(max(benchmark.answers)) + 1]


def letter_tokens(benchmark: PreparedBenchmark, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the token with which an answer of each letter begins, as answers are encoded in
    training.

    Raises:
        UserError: an answer is no letter, or letters begin with the same token.
    """
    tokens: dict[str, int] = {}
    for letter in option_letters(benchmark):
        token = tokenizer.encode(letter, add_special_tokens=False).ids[0]
        for other, others_token in tokens.items():
            if token == others_token:
                raise UserError(
                    f"vlm.lm_tokenizer: an answer {letter} must begin with another token than an "
                    f"answer {other}, or they cannot be told apart; got {token} for both"
                )
        tokens[letter] = token
    return tokens
