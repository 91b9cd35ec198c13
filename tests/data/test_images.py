"""Images of every format as a person would see them, and why some are refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nanovlm.data.images import (
    MAX_PIXELS,
    StoredImage,
    UnreadableImage,
    read_image,
    resize_to_uint8,
)


def stored(image: Image.Image, format: str = "PNG", **options: Any) -> StoredImage:
    content = io.BytesIO()
    image.save(content, format, **options)
    return {"bytes": content.getvalue(), "path": None}


def only_colour(image: Image.Image) -> tuple[int, ...]:
    """Return the colour of an image that has one, to within what JPEG changes."""
    pixels = np.asarray(image).reshape(-1, 3)
    assert (np.ptp(pixels.astype(int), axis=0) <= 4).all()
    return tuple(pixels[0].tolist())


def reason(image: StoredImage) -> str:
    with pytest.raises(UnreadableImage) as error:
        read_image(image)
    return str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_white_is_white_in_every_mode(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 7), 65535, np.uint16))
    else:
        image = Image.new("RGB", (7, 5), "white").convert(mode)
    assert only_colour(read_image(stored(image))) == (255, 255, 255)


def test_a_jpeg_in_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = only_colour(read_image(stored(image, "JPEG", quality=95)))
    assert red > 250 and green < 5 and blue < 5


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    grey = np.asarray(read_image(stored(Image.fromarray(values))))
    assert grey[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if mode == "P":
        content = stored(Image.new("P", (4, 4), 0), transparency=0)
    else:
        content = stored(image.convert(mode))
    assert only_colour(read_image(content)) == (255, 255, 255)


def test_half_transparent_black_is_grey() -> None:
    (grey, *_) = only_colour(read_image(stored(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))))
    assert grey == 127


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    content = stored(red, format, save_all=True, append_images=[blue], **options)
    assert only_colour(read_image(content)) == (255, 0, 0)


def test_a_photo_is_turned_upright() -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top is on the right
    upright = read_image(stored(image, "PNG", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)
    assert upright.getpixel((5, 17)) == (0, 0, 255)


def test_a_png_with_a_huge_text_chunk() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    assert only_colour(read_image(stored(Image.new("RGB", (4, 4), "lime"), pnginfo=text))) == (
        0,
        255,
        0,
    )


def test_a_truncated_jpeg_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = stored(Image.fromarray(noise), "JPEG")["bytes"]
    assert content is not None
    assert "truncated" in reason({"bytes": content[: len(content) // 2], "path": None})


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    assert f"{side} x {side} pixels, at most {MAX_PIXELS}" in reason({"bytes": png, "path": None})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": b"", "path": None}, "not an image in a known format"),
        ({"bytes": b"<html>not found</html>", "path": None}, "not an image in a known format"),
        ({"bytes": None, "path": "/fsx/m4/1.png"}, "path of a file that is not there: /fsx/m4"),
        ({"bytes": None, "path": "x" * 5000}, "holds a path that cannot be read"),
        ({"bytes": None, "path": "a\0b"}, "that is not there"),
    ],
)
def test_what_holds_no_image_is_refused(image: StoredImage, message: str) -> None:
    assert message in reason(image)


def test_fractions_are_refused() -> None:
    assert "unknown range" in reason(stored(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_broken_bytes_are_refused_and_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = stored(noise, format)["bytes"]
        assert whole is not None
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(0, len(content), 8):
                content[place] = rng.integers(256)
            try:
                read_image({"bytes": bytes(content), "path": None})
            except UnreadableImage:
                continue


def test_an_image_beside_the_parquet_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    image = read_image({"bytes": None, "path": str(tmp_path / "red.png")})
    assert only_colour(image) == (255, 0, 0)


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
def test_the_whole_image_is_squashed(resampling: str) -> None:
    image = Image.new("RGB", (100, 20), (255, 0, 0))
    image.paste((0, 0, 255), (50, 0, 100, 20))
    red, green, blue = resize_to_uint8(image, 10, resampling)
    assert (red[:, :4] == 255).all() and (red[:, 6:] == 0).all()
    assert (blue[:, :4] == 0).all() and (blue[:, 6:] == 255).all()
    assert (green == 0).all()


def test_resampling_differs() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    bilinear, bicubic = (
        resize_to_uint8(Image.fromarray(noise), 8, name) for name in ("bilinear", "bicubic")
    )
    assert (bilinear != bicubic).any()
