"""A tokenizer's files, in a folder or on the hub: the tokenizer, and the token that ends a text.

Outside `models/` and `data/`, since both need it: files of some models do not say how a text ends.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from nanovlm.config.start_keys import KNOWN_EOS
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.files import check_whole

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SETTING = "vlm.lm_tokenizer"


def setting(name: str) -> str:
    """Return how messages call the tokenizer `name`."""
    return f"{_SETTING}={name!r}"


def read_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`, a folder with tokenizer.json or a hub id.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    file = _find_folder(name) / TOKENIZER_FILE
    check_whole(setting(name), file)
    if not file.is_file():
        raise UserError(f"{setting(name)}: {file.parent} has no {TOKENIZER_FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise UserError(f"{setting(name)}: {file} is not a tokenizer: {error}") from error
    # transformers may have stored both; no text's tokens may depend on the texts beside it.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_token_id(name: str) -> int | None:
    """Return the token that ends a text, as the tokenizer's files say; None if they do not.

    No file is read for tokenizers of KNOWN_EOS.

    Raises:
        UserError: as `read_tokenizer`, or the token that they name is none of the tokenizer's.
    """
    if name in KNOWN_EOS:
        return KNOWN_EOS[name]
    file = _find_folder(name) / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{setting(name)}: {file} cannot be read: {error!r}") from error
    number = None if token is None else read_tokenizer(name).token_to_id(str(token))
    if token is not None and number is None:
        raise UserError(f"{setting(name)}: {file} has eos_token={token!r}, which is no token of it")
    return number


def _find_folder(name: str) -> Path:
    return find_folder(_SETTING, name, (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE))
