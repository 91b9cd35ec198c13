"""What turns text into token ids and images into pixels."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.data.digits import BUILTIN_DIGITS, digits_tokenizer
from nanovlm.data.hub import HUB_ERRORS, reason
from nanovlm.data.images import resize_to_uint8, to_rgb
from nanovlm.errors import WITHOUT_HUB, UserError
from nanovlm.files import check_whole, find_local_folder

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`: `builtin:digits`, a folder with tokenizer.json, or a hub id.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer()
    place = f"vlm.lm_tokenizer={name!r}"
    try:
        # Not hf_hub_download, which repeats its requests for 23 s where there is no network.
        folder = find_local_folder(place, name) or Path(
            snapshot_download(name, allow_patterns=[TOKENIZER_FILE])
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{place}: there is no folder {name}, and reading {TOKENIZER_FILE} from the hub "
            f"failed: {reason(error)}. {WITHOUT_HUB}"
        ) from error
    file = folder / TOKENIZER_FILE
    check_whole(place, file)
    if not file.is_file():
        raise UserError(f"{place}: {folder} has no {TOKENIZER_FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise UserError(f"{place}: {file} is not a tokenizer: {error}") from error
    # transformers may have stored both; no text's tokens may depend on the texts beside it.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def image_to_uint8(image: Image.Image, size: int, resampling: str) -> torch.Tensor:
    """Return the whole image as uint8[3, size, size]: as RGB, squashed to a square."""
    return torch.from_numpy(resize_to_uint8(to_rgb(image), size, resampling).copy())
