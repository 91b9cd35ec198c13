"""What turns text into token ids and images into pixels."""

from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.data.digits import BUILTIN_DIGITS, digits_tokenizer
from nanovlm.data.sources import WORKS_OFFLINE, reason
from nanovlm.errors import UserError

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`: `builtin:digits`, a folder with tokenizer.json, or a hub id.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    if name == BUILTIN_DIGITS:
        return digits_tokenizer()
    place = f"vlm.lm_tokenizer={name!r}"
    file = Path(name, TOKENIZER_FILE)
    if Path(name).is_dir() and not file.is_file():
        raise UserError(f"{place}: this folder has no {TOKENIZER_FILE}")
    try:
        path = str(file) if file.is_file() else hf_hub_download(name, TOKENIZER_FILE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place}: there is no folder {name}, and reading {TOKENIZER_FILE} from the hub "
            f"failed: {reason(error)}. {WORKS_OFFLINE}"
        ) from error
    return Tokenizer.from_file(path)


def image_to_uint8(image: Image.Image, size: int) -> torch.Tensor:
    """Return the whole image as uint8[3, size, size]: RGB, squashed to a square, bilinear."""
    pixels = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
