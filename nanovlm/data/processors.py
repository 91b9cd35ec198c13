"""What turns text into token ids and images into pixels."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import BUILTIN_DIGITS, END_OF_TEXT, digits_tokenizer
from nanovlm.data.hub import HUB_ERRORS, reason
from nanovlm.data.images import resize_to_uint8, to_rgb
from nanovlm.errors import WITHOUT_HUB, UserError
from nanovlm.files import check_whole, find_local_folder

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`: `builtin:digits`, a folder with tokenizer.json, or a hub id.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer()
    return _read_tokenizer(name, _find_folder(name))


def eos_token_id(name: str) -> int | None:
    """Return the token that ends a text, as the tokenizer's files say; None if they do not.

    Raises:
        UserError: as `load_tokenizer`, or the token that they name is none of the tokenizer's.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer().token_to_id(END_OF_TEXT)
    folder = _find_folder(name)
    file = folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        token = values.get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{_place(name)}: {file} cannot be read: {error!r}") from error
    if token is None:
        return None
    number = _read_tokenizer(name, folder).token_to_id(str(token))
    if number is None:
        raise UserError(f"{_place(name)}: {file} has eos_token={token!r}, which is no token of it")
    return number


def check_tokens(vlm: VLMConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model cannot read some token, or if EOS is not what ends a text.

    What counts is the largest id: a tokenizer of few tokens may number them with gaps.
    """
    messages = []
    place = _place(vlm.lm_tokenizer)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vlm.lm_vocab_size:
        messages.append(
            f"vlm.lm_vocab_size must be above all token ids of {place}, "
            f"got {vlm.lm_vocab_size} and ids up to {largest}"
        )
    special = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if vlm.lm_eos_token_id not in special:
        token = tokenizer.id_to_token(vlm.lm_eos_token_id)
        what = "no token" if token is None else f"{token!r}, which is text,"
        choices = ", ".join(f"{number} ({text})" for number, text in list(special.items())[:10])
        messages.append(
            f"vlm.lm_eos_token_id must be a special token, got {vlm.lm_eos_token_id}: {what} in "
            f"{place}. Choices: {choices or 'none; mark one in its added_tokens'}"
        )
    if messages:
        raise UserError(*messages)


def _place(name: str) -> str:
    return f"vlm.lm_tokenizer={name!r}"


def _find_folder(name: str) -> Path:
    patterns = [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]
    try:
        # Not hf_hub_download, which repeats its requests for 23 s where there is no network.
        return find_local_folder(_place(name), name) or Path(
            snapshot_download(name, allow_patterns=patterns)
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{_place(name)}: there is no folder {name}, and reading {TOKENIZER_FILE} from the hub "
            f"failed: {reason(error)}. {WITHOUT_HUB}"
        ) from error


def _read_tokenizer(name: str, folder: Path) -> Tokenizer:
    file = folder / TOKENIZER_FILE
    check_whole(_place(name), file)
    if not file.is_file():
        raise UserError(f"{_place(name)}: {folder} has no {TOKENIZER_FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise UserError(f"{_place(name)}: {file} is not a tokenizer: {error}") from error
    # transformers may have stored both; no text's tokens may depend on the texts beside it.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def image_to_uint8(image: Image.Image, size: int, resampling: str) -> torch.Tensor:
    """Return the whole image as uint8[3, size, size]: as RGB, squashed to a square."""
    return torch.from_numpy(resize_to_uint8(to_rgb(image), size, resampling).copy())
