"""The most memory that a process takes to decode the largest images it accepts, format by format.

    python benchmarks/image_memory.py        # about a minute

Each image is decoded by `read_image` in a process of its own that has loaded what the processes
have that prepare data. Printed are the peak of the whole process, and the bytes a pixel that were
added to it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.data import build_images  # what the processes have that prepare data
from nanovlm.data.images import read_image

CASES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("a.jpg", "RGB", 49, {"quality": 85}),
    ("progressive.jpg", "RGB", 27, {"progressive": True, "subsampling": 0}),
    ("reduced.jpg", "RGB", 170, {"quality": 85}),
    ("a.png", "RGBA", 46, {"compress_level": 1}),
    ("grey.png", "L", 75, {"compress_level": 1}),
    ("a.webp", "RGB", 19, {"method": 0}),
    ("a.avif", "RGB", 27, {"speed": 10}),
    ("a.jp2", "RGB", 16, {"irreversible": True, "quality_mode": "rates", "quality_layers": [20]}),
    ("a.tif", "RGB", 32, {"compression": "tiff_deflate"}),
    ("a.bmp", "RGB", 36, {}),
)
"""File, mode, million pixels, and how it is saved."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # in the processes below
    file: Path | None = parser.parse_args().file
    if file is not None:
        measure(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, mode, millions, options in CASES:
            path = Path(folder, name)
            picture(int((millions * 1e6) ** 0.5)).convert(mode).save(path, **options)
            subprocess.run([sys.executable, __file__, "--file", path], check=True)
            path.unlink()


def picture(side: int) -> Image.Image:
    """Return a square image that compresses about as a photo does."""
    rng = np.random.default_rng(0)
    tile = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((800, 600))
    image = Image.new("RGB", (side, side))
    for x in range(0, side, 800):
        for y in range(0, side, 600):
            image.paste(tile, (x, y))
    return image


def measure(file: Path) -> None:
    """Print what decoding the file has taken."""
    assert build_images
    Image.MAX_IMAGE_PIXELS = None  # it would warn of the largest one
    with Image.open(file) as image:
        num_pixels = image.width * image.height
    before = peak_megabytes()
    read_image({"bytes": file.read_bytes(), "path": None})
    peak = peak_megabytes()
    print(
        f"{file.name}: {num_pixels / 1e6:.0f} million pixels, peak {peak:.0f} MB, "
        f"{(peak - before) * 1e6 / num_pixels:.1f} bytes a pixel"
    )


def peak_megabytes() -> float:
    # Not getrusage, whose maximum a process inherits from the one that started it.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
