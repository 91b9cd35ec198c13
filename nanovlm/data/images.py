"""One stored image as pixels: decoded as a person would see it, or refused with the reason.

Without torch, since this runs in the processes that prepare a data set.
"""

import errno
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from nanovlm.files import LFS_HEAD

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""All that is opened. Pillow could open more: EPS, for example, which Ghostscript runs."""

MAX_DECODING_BYTES = 400_000_000
"""Images that would take more are refused before they are decoded, or reduced by the decoder."""
_BESIDE_THE_PIXELS = {"AVIF": 6, "JPEG2000": 16, "TIFF": 3, "WEBP": 12}
"""Bytes a pixel that decoders hold while they fill Pillow's own image, as measured."""
_PROGRESSIVE_JPEG = 6  # the coefficients of all pixels, at 16 bits
_REDUCTIONS = (1, 2, 4, 8)
"""Of width and height; what JPEG's decoder can leave out."""

_ORIENTATION = ExifTags.Base.Orientation
_ON_ITS_SIDE = (5, 6, 7, 8)
"""Orientations in which a row of the file is a column of the image."""
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Where a PNG may hold one."""

_MAX_PIXELS = 2**20
"""That are converted together: a conversion holds several copies."""
_WHITE = (1, 255, 65535)
"""What white may be in grey values that are not stored with 8 bits."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ERRORS_OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP}
"""Others, such as a failing disk, are not the row's fault."""

# Some rows of the_cauldron are PNGs whose text chunks exceed Pillow's limit of 1 MiB.
_TEXT_BYTES = 100 * 2**20
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _TEXT_BYTES


class StoredImage(TypedDict):
    """An image in a parquet file, as `datasets` writes it: its bytes, or where the file is."""

    bytes: bytes | None
    path: str | None


Convert = Callable[[Image.Image], Image.Image]
"""From an image of some mode to RGB, each pixel by itself."""


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason."""


def is_there(stored: StoredImage | None) -> bool:
    """Return whether anything is stored; `datasets` writes either form for an image of None."""
    return stored is not None and (stored["bytes"] is not None or bool(stored["path"]))


def read_image(stored: StoredImage) -> Image.Image:
    """Return the image as RGB, in about `MAX_DECODING_BYTES` of memory at most.

    Turned as its EXIF entry says; transparency on white; grey of more than 8 bits scaled by its
    range; the first frame of an animation; a JPEG that is too large reduced by its decoder. Raises
    UnreadableImage if it is not there, broken, of an unknown format or too large.
    """
    content = _stored_bytes(stored)
    with _opened(content) as image:
        _fit_into_memory(image, len(content))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def image_size(stored: StoredImage) -> tuple[int, int]:
    """Return width and height of the image, turned as its EXIF entry says and never reduced.

    Little more than its header is read. Raises UnreadableImage, as far as that can be known.
    """
    content = _stored_bytes(stored)
    with _opened(content) as image:
        width, height = image.size  # before the decoder is told to reduce it
        _fit_into_memory(image, len(content))
        return (height, width) if _is_on_its_side(image, content) else (width, height)


def _is_on_its_side(image: Image.Image, content: bytes) -> bool:
    """Return whether an upright view of an image swaps its sides."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _ORIENTATION in image.tag_v2:
        return False  # Pillow gives the turned size already
    if isinstance(image, PngImagePlugin.PngImageFile) and not any(
        name in content for name in _PNG_ORIENTATIONS
    ):
        return False  # Pillow would decode the image to look for what may stand behind it
    return image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Give the image of a file. Raises UnreadableImage if what is done with it here cannot be."""
    try:
        # What matters of Pillow's warnings ends as a reason here.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(content), formats=FORMATS) as image,
        ):
            yield image
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's trouble, and not the image's
        reason = str(error).partition("\n")[0]
        if isinstance(error, Image.UnidentifiedImageError):
            is_pointer = content.startswith(LFS_HEAD)
            reason = f"{'a pointer of Git LFS, ' * is_pointer}not an image in a known format"
        raise UnreadableImage(reason or type(error).__name__) from error


def _fit_into_memory(image: Image.Image, num_bytes: int) -> None:
    """Let the decoder reduce the image if it has to, or raise UnreadableImage if it cannot."""
    width, height = image.size
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    beside = _BESIDE_THE_PIXELS.get(image.format or "", 0)
    if is_jpeg and image.info.get("progressive"):
        beside = _PROGRESSIVE_JPEG
    decoded = 1 if image.mode in ("1", "L", "P") else 4
    for reduction in _REDUCTIONS if is_jpeg else (1,):
        pixel_bytes = beside + (decoded + 4) / reduction**2  # 4: as RGB, or turned
        needed = num_bytes + width * height * pixel_bytes
        if needed <= MAX_DECODING_BYTES:
            if reduction > 1:
                image.draft(None, (width // reduction, height // reduction))
            return
    raise UnreadableImage(
        f"{width} x {height} pixels of {image.format} take {needed / 1e6:.0f} MB to decode, "
        f"at most {MAX_DECODING_BYTES / 1e6:.0f} MB"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, itself if it is that."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert: Convert = methodcaller("convert", "RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        convert = _grey_by_range(image)
    elif image.has_transparency_data:
        convert = _on_white
    width, height = image.size
    rows = max(1, _MAX_PIXELS // max(1, width))
    if rows >= height:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height)))
        result.paste(convert(part), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _grey_by_range(image: Image.Image) -> Convert:
    """Return what makes RGB of 16-bit, 32-bit and floating-point grey; Pillow cuts off at 255.

    Nothing in such a file says which value is white. It is 255 if none is above that, else 65,535;
    of floating-point values 1 if none is above that. Raises UnreadableImage for other ranges.
    """
    low, high = _range(image)
    possible = _WHITE if image.mode == "F" else _WHITE[1:]
    white = next((white for white in possible if low >= 0 and high <= white), None)
    if white is None:
        raise UnreadableImage(f"grey values from {low:g} to {high:g}, of an unknown range")
    transparent = image.info.get("transparency")

    def convert(part: Image.Image) -> Image.Image:
        values = np.asarray(part)
        if not np.isfinite(values).all():
            raise UnreadableImage("grey values that are no numbers")
        grey = np.rint(values * (255 / white)).astype(np.uint8)
        if isinstance(transparent, int):  # the value that stands for transparent
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return convert


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the lowest and the highest value of an image with one channel."""
    known = image.mode in ("F", "I", "I;16")  # Pillow lacks the others' extrema
    low, high = (image if known else image.convert("I")).getextrema()
    assert isinstance(low, int | float) and isinstance(high, int | float)
    return low, high


def resize_to_uint8(image: Image.Image, size: int, resampling: str) -> np.ndarray:
    """Return a whole RGB image squashed to a square, uint8[3, size, size].

    Args:
        resampling: `bilinear` or `bicubic`, both averaging over all pixels where it shrinks.
    """
    pixels = np.asarray(image.resize((size, size), RESAMPLING[resampling]))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _stored_bytes(stored: StoredImage) -> bytes:
    if stored["bytes"] is not None:
        return stored["bytes"]
    path = stored["path"]
    if not path:
        raise UnreadableImage("neither bytes nor a path")
    try:
        if not Path(path).is_file():
            raise UnreadableImage(f"holds the path of a file that is not there: {path}")
        if (size := Path(path).stat().st_size) > MAX_DECODING_BYTES:
            raise UnreadableImage(f"holds the path of a file of {size / 1e6:.0f} MB: {path}")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in _ERRORS_OF_A_PATH:
            raise UnreadableImage(f"holds a path that cannot be read: {error}") from error
        raise
