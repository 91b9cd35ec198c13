"""Tokenizers by name, and what a model must have in common with one."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import BUILTIN_DIGITS, END_OF_TEXT, digits_tokenizer
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.files import check_whole

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SETTING = "vlm.lm_tokenizer"


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`: `builtin:digits`, a folder with tokenizer.json, or a hub id.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer()
    file = _find_folder(name) / TOKENIZER_FILE
    check_whole(_setting(name), file)
    if not file.is_file():
        raise UserError(f"{_setting(name)}: {file.parent} has no {TOKENIZER_FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise UserError(f"{_setting(name)}: {file} is not a tokenizer: {error}") from error
    # transformers may have stored both; no text's tokens may depend on the texts beside it.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_token_id(name: str) -> int | None:
    """Return the token that ends a text, as the tokenizer's files say; None if they do not.

    Raises:
        UserError: as `load_tokenizer`, or the token that they name is none of the tokenizer's.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer().token_to_id(END_OF_TEXT)
    file = _find_folder(name) / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{_setting(name)}: {file} cannot be read: {error!r}") from error
    number = None if token is None else load_tokenizer(name).token_to_id(str(token))
    if token is not None and number is None:
        raise UserError(
            f"{_setting(name)}: {file} has eos_token={token!r}, which is no token of it"
        )
    return number


def check_tokens(vlm: VLMConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model cannot read some token, or if EOS is not what ends a text.

    What counts is the largest id: a tokenizer of few tokens may number them with gaps.
    """
    messages = []
    setting = _setting(vlm.lm_tokenizer)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vlm.lm_vocab_size:
        messages.append(
            f"vlm.lm_vocab_size must be above all token ids of {setting}, "
            f"got {vlm.lm_vocab_size} and ids up to {largest}"
        )
    special = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if vlm.lm_eos_token_id not in special:
        token = tokenizer.id_to_token(vlm.lm_eos_token_id)
        what = "no token" if token is None else f"{token!r}, which is text,"
        choices = ", ".join(f"{number} ({text})" for number, text in list(special.items())[:10])
        messages.append(
            f"vlm.lm_eos_token_id must be a special token, got {vlm.lm_eos_token_id}: {what} in "
            f"{setting}. Choices: {choices or 'none; mark one in its added_tokens'}"
        )
    if messages:
        raise UserError(*messages)


def _setting(name: str) -> str:
    return f"{_SETTING}={name!r}"


def _find_folder(name: str) -> Path:
    return find_folder(_SETTING, name, (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE))
