"""One stored image as pixels: decoded as a person would see it, or refused with the reason.

Without torch, since this runs in the processes that prepare a data set.
"""

import errno
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: 256 MB as RGB, Pillow's own first limit."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ERRORS_OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP}
"""Others, such as a disk that fails, are not the row's fault."""

# Some rows of the_cauldron are PNGs whose text chunks exceed Pillow's limit of 1 MiB.
_TEXT_BYTES = 100 * 2**20
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _TEXT_BYTES


class StoredImage(TypedDict):
    """An image in a parquet file, as `datasets` writes it: its bytes, or where the file is."""

    bytes: bytes | None
    path: str | None


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason."""


def is_there(stored: StoredImage | None) -> bool:
    """Return whether anything is stored; `datasets` writes either form for an image of None."""
    return stored is not None and (stored["bytes"] is not None or bool(stored["path"]))


def read_image(stored: StoredImage) -> Image.Image:
    """Return the image as RGB.

    Turned as its EXIF entry says; transparency on white; 16-bit grey scaled to 8 bits; the first
    frame of an animation. Raises UnreadableImage if it is not there, broken or too large.
    """
    try:
        with _quietly(), Image.open(io.BytesIO(_stored_bytes(stored))) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"{width} x {height} pixels, at most {MAX_PIXELS} in all")
            image.load()
            return to_rgb(image)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's trouble, and not the image's
        reason = str(error).partition("\n")[0]
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image in a known format"
        raise UnreadableImage(reason or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB; see `read_image`."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UnreadableImage("pixels are fractions of an unknown range")
    if image.mode.startswith("I"):  # Pillow itself would cut the values off at 255
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def resize_to_uint8(image: Image.Image, size: int, resampling: str) -> np.ndarray:
    """Return a whole RGB image squashed to a square, uint8[3, size, size].

    Args:
        resampling: `bilinear` or `bicubic`, both averaging over all pixels where it shrinks.
    """
    pixels = np.asarray(image.resize((size, size), RESAMPLING[resampling]))
    return pixels.transpose(2, 0, 1)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Pillow's warnings off the screen: what matters of them ends as a reason here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stored_bytes(stored: StoredImage) -> bytes:
    if stored["bytes"] is not None:
        return stored["bytes"]
    path = stored["path"]
    if not path:
        raise UnreadableImage("neither bytes nor a path")
    try:
        if not Path(path).is_file():
            raise UnreadableImage(f"holds the path of a file that is not there: {path}")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in _ERRORS_OF_A_PATH:
            raise UnreadableImage(f"holds a path that cannot be read: {error}") from error
        raise
