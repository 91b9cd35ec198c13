"""A tokenizer's files, in a folder or on the hub: the tokenizer, the token that ends a text, the
chat template.

Outside `models/` and `data/`, since both need it: files of some models do not say how a text ends.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nanovlm.config.start_keys import KNOWN_EOS
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.files import check_whole

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
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
    folder = _find_folder(name)
    with _readable(name, folder / TOKENIZER_CONFIG_FILE):
        token = _config_values(folder).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    number = None if token is None else read_tokenizer(name).token_to_id(str(token))
    if token is not None and number is None:
        raise UserError(
            f"{setting(name)}: {folder / TOKENIZER_CONFIG_FILE} has eos_token={token!r}, which is "
            "no token of it"
        )
    return number


def chat_template(name: str) -> str | None:
    """Return the text in Jinja that makes conversations of messages; None if no file has one.

    It is a file of its own, as newer versions of transformers write it, or an entry of
    tokenizer_config.json: of several templates the one with the name `default`.

    Raises:
        UserError: as `read_tokenizer`, or a file cannot be read.
    """
    if name.startswith("builtin:"):
        return None
    folder = _find_folder(name)
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        with _readable(name, folder / CHAT_TEMPLATE_FILE):
            return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    with _readable(name, folder / TOKENIZER_CONFIG_FILE):
        found = _config_values(folder).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if not isinstance(found, str | None):
            raise TypeError(f"chat_template must be a text, got {found!r}")
    return found


def special_tokens(name: str) -> dict[str, str]:
    """Return the tokens that a chat template may name, such as `bos_token`, by that name.

    Raises:
        UserError: as `read_tokenizer`, or the file cannot be read.
    """
    if name.startswith("builtin:"):
        return {}
    folder = _find_folder(name)
    with _readable(name, folder / TOKENIZER_CONFIG_FILE):
        values = _config_values(folder)
        tokens = {key: values.get(key) for key in _SPECIAL_TOKENS}
        return {
            key: str(token["content"]) if isinstance(token, dict) else str(token)
            for key, token in tokens.items()
            if token is not None
        }


def _config_values(folder: Path) -> Mapping[str, Any]:
    file = folder / TOKENIZER_CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(values, dict):
        raise TypeError(f"must hold one JSON object, got {type(values).__name__}")
    return values


@contextmanager
def _readable(name: str, file: Path) -> Iterator[None]:
    """Raise UserError if what is done here with the file's content cannot be done."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{setting(name)}: {file} cannot be read: {error!r}") from error


def _find_folder(name: str) -> Path:
    return find_folder(_SETTING, name, (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE))
