"""Images of every format as a person would see them, and why some are refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from nanovlm.data import images
from nanovlm.data.images import (
    FORMATS,
    MAX_DECODING_BYTES,
    StoredImage,
    UnreadableImage,
    image_size,
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
    side = int((MAX_DECODING_BYTES / 5) ** 0.5) + 1  # grey is decoded to 1 byte, and to RGB
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    message = f"{side} x {side} pixels of PNG take 400 MB to decode, at most 400 MB"
    assert message in reason({"bytes": png, "path": None})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": b"", "path": None}, "not an image in a known format"),
        ({"bytes": b"version https://git-lfs.github.com/spec/v1", "path": None}, "of Git LFS, not"),
        ({"bytes": b"<html>not found</html>", "path": None}, "not an image in a known format"),
        ({"bytes": None, "path": "/fsx/m4/1.png"}, "path of a file that is not there: /fsx/m4"),
        ({"bytes": None, "path": "x" * 5000}, "holds a path that cannot be read"),
        ({"bytes": None, "path": "a\0b"}, "that is not there"),
    ],
)
def test_what_holds_no_image_is_refused(image: StoredImage, message: str) -> None:
    assert message in reason(image)


@pytest.mark.parametrize("kind", ["int32", "int16", "uint16", "uint32", "float32", "float64"])
def test_grey_of_8_bits_in_a_wider_type(kind: str) -> None:
    values = np.array([[0, 1, 100, 255]])
    assert grey_of(values.astype(kind)) == [0, 1, 100, 255]


@pytest.mark.parametrize("kind", ["int32", "uint16", "float32"])
def test_grey_of_16_bits_in_any_type(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]])
    assert grey_of(values.astype(kind)) == [0, 1, 128, 255]


def test_grey_as_fractions() -> None:
    assert grey_of(np.array([[0, 0.25, 0.5, 1]], np.float32)) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 65536]], np.int32), "grey values from 0 to 65536, of an unknown range"),
        (np.array([[-1, 5]], np.int32), "grey values from -1 to 5, of an unknown range"),
        (np.array([[-0.5, 0.5]], np.float32), "grey values from -0.5 to 0.5, of an unknown range"),
        (np.array([[0, 1e9]], np.float32), "of an unknown range"),
        (np.array([[0.5, np.nan]], np.float32), "grey values that are no numbers"),
        (np.array([[np.nan, 0.5]], np.float32), "of an unknown range"),
        (np.array([[0.5, np.inf]], np.float32), "of an unknown range"),
    ],
)
def test_grey_of_another_range_is_refused(values: np.ndarray, message: str) -> None:
    assert message in reason(as_datasets_writes(values))


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_grey_in_either_byte_order(byte_order: str) -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16).astype(byte_order))
    assert np.asarray(read_image(stored(image, "TIFF")))[0, :, 0].tolist() == [0, 1, 255]


def test_the_transparent_value_of_16_bit_grey_is_white() -> None:
    image = Image.fromarray(np.array([[0, 1000, 65535, 2570]], np.uint16))
    content = stored(image, transparency=1000)
    assert np.asarray(read_image(content))[0, :, 0].tolist() == [0, 255, 255, 10]


def grey_of(values: np.ndarray) -> list[int]:
    """Return the pixels of one row of an image that `datasets` made of an array."""
    pixels = np.asarray(read_image(as_datasets_writes(values)))
    assert (pixels == pixels[:, :, :1]).all()
    return list(pixels[0, :, 0].tolist())


def as_datasets_writes(values: np.ndarray) -> StoredImage:
    encoded = datasets.Image().encode_example(values)
    return {"bytes": encoded["bytes"], "path": encoded["path"]}


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "PCX", "TGA", "SGI", "DDS", "ICNS"])
def test_other_formats_are_not_opened(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ghostscript(*_: Any) -> None:
        raise AssertionError("Ghostscript is started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", no_ghostscript)
    content = stored(Image.new("RGB", (16, 16), "red"), format)
    assert reason(content) == "not an image in a known format"


@pytest.mark.parametrize("format", FORMATS)
def test_these_formats_are_opened(format: str) -> None:
    colour = only_colour(read_image(stored(Image.new("RGB", (16, 16), (200, 40, 90)), format)))
    assert np.abs(np.array(colour) - (200, 40, 90)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "L", "I;16"])
def test_a_large_image_is_converted_in_parts_to_the_same_pixels(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 4), np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("RGB").quantize(16) if mode == "P" else image
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 200)
    content = stored(image if mode in ("P", "I;16") else image.convert(mode), "TIFF")
    whole = read_image(content)
    monkeypatch.setattr(images, "_MAX_PIXELS", 7 * 20)
    assert read_image(content).tobytes() == whole.tobytes()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_too_large_is_reduced_by_its_decoder(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (101, 64), "red")
    image.paste("blue", (50, 0, 101, 64))
    content = stored(image, "JPEG", progressive=progressive)
    size = len(content["bytes"] or b"")
    coefficients = 6 * 101 * 64 if progressive else 0
    sizes = []
    for pixel_bytes in (8, 2, 0.5, 0.125):
        limit = size + coefficients + int(pixel_bytes * 101 * 64)
        monkeypatch.setattr(images, "MAX_DECODING_BYTES", limit)
        reduced = read_image(content)
        sizes.append(reduced.size)
        pixels = np.asarray(reduced).astype(int)
        assert np.abs(pixels[0, 0] - (255, 0, 0)).max() < 20
        assert np.abs(pixels[-1, -1] - (0, 0, 255)).max() < 20
    assert sizes == [(101, 64), (51, 32), (26, 16), (13, 8)]
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", size + coefficients + 100)
    assert "101 x 64 pixels of JPEG take 0 MB to decode, at most 0 MB" in reason(content)


@pytest.mark.parametrize(("format", "pixel_bytes"), [("PNG", 8), ("WEBP", 20), ("JPEG2000", 24)])
def test_what_decoders_hold_besides_counts(
    format: str, pixel_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = stored(Image.new("RGB", (50, 40), "red"), format)
    needed = len(content["bytes"] or b"") + 50 * 40 * pixel_bytes
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", needed)
    assert read_image(content).size == (50, 40)
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", needed - 1)
    assert f"50 x 40 pixels of {format} take" in reason(content)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", 10)
    path = str(tmp_path / "red.png")
    assert f"holds the path of a file of 0 MB: {path}" in reason({"bytes": None, "path": path})


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


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"BMP", "GIF", "PPM", "JPEG2000"}))
def test_the_size_is_that_of_the_upright_image(format: str) -> None:
    image = Image.new("RGB", (48, 20), "red")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = stored(image, format, exif=exif)
        assert image_size(content) == read_image(content).size
        assert image_size(content) == ((48, 20) if orientation < 5 else (20, 48))


@pytest.mark.parametrize("format", ["BMP", "GIF", "PPM", "JPEG2000"])
def test_the_size_of_an_image_that_cannot_be_turned(format: str) -> None:
    assert image_size(stored(Image.new("RGB", (48, 20)), format)) == (48, 20)


@pytest.mark.parametrize("name", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_a_png_that_is_turned_by_a_text_behind_its_pixels(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    by_name = {
        "XML:com.adobe.xmp": '<x tiff:Orientation="6"/>',
        "Raw profile type exif": f"\nexif\n{len(raw):8}\n{raw.hex()}\n",
    }
    text = PngImagePlugin.PngInfo()
    text.add_itxt(name, by_name[name])
    content = stored(Image.new("RGB", (48, 20)), pnginfo=text)["bytes"]
    assert content is not None
    start = content.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    image: StoredImage = {"bytes": moved, "path": None}
    assert image_size(image) == read_image(image).size == (20, 48)


def test_a_png_is_not_decoded_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.new("RGB", (48, 20)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert image_size(content) == (48, 20)


def test_the_size_of_a_jpeg_that_its_decoder_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = stored(Image.new("RGB", (640, 400), "red"), "JPEG", exif=exif)
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", 640 * 400 * 3)
    assert read_image(content).size == (200, 320)
    assert image_size(content) == (400, 640)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\nabc"])
def test_what_has_no_size(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        image_size({"bytes": content, "path": None})
