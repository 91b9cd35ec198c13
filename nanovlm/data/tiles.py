"""Images cut into square tiles, as 8k models read them, and what stands for each in a text.

An image is resized until both sides are multiples of a tile's side p, nearly keeping its aspect
ratio, and cut row by row. Before its tiles comes the whole image squashed to one, the global tile;
an image of a single tile is its own.

Source: data/custom_transforms.py and data/processors.py of huggingface/nanoVLM (4e0c096).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nanovlm.config.generations import MAX_TILES_A_SIDE
from nanovlm.data.images import RESAMPLING, resize_to_uint8


@dataclass(frozen=True, slots=True)
class Tiling:
    """The grid that an image is cut into."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        """Tiles in all, the global one among them."""
        cut = self.rows * self.columns
        return cut + 1 if cut > 1 else 1

    def markers(self, tokens: Mapping[str, str]) -> list[str]:
        """Return the token before each tile, in their order.

        Args:
            tokens: the spelling of each extra token, by its name (`VLMConfig.vlm_extra_tokens`).
        """
        cut = [
            tokens[f"r{row}c{column}"]
            for row in range(1, self.rows + 1)
            for column in range(1, self.columns + 1)
        ]
        return [tokens["global_image_token"], *(cut if len(cut) > 1 else ())]


def tile_image(
    width: int, height: int, tile_size: int, max_size: int, resize_to_max_size: bool = False
) -> Tiling:
    """Return the grid of an image of `width` x `height` pixels.

    The published rule in the published arithmetic, doubles: rounding makes a row or column more
    than the exact ratio would need for one square image in 40. Where nanoVLM would run out of
    markers that way, the grid ends with them.

    Args:
        tile_size: p, side of a tile in pixels.
        max_size: longest side of the resized image in pixels, a multiple of p.
        resize_to_max_size: whether smaller images are enlarged to it.
    """
    long, short = max(width, height), min(width, height)
    target = math.ceil(long / tile_size) * tile_size
    target = max_size if resize_to_max_size else min(max_size, target)
    num_long = target // tile_size
    num_short = max(1, math.ceil(short * (target / long) / tile_size))
    num_short = min(num_short, MAX_TILES_A_SIDE)
    return Tiling(num_short, num_long) if width >= height else Tiling(num_long, num_short)


def cut_into_tiles(
    image: Image.Image, tiling: Tiling, tile_size: int, resampling: str
) -> np.ndarray:
    """Return the tiles of an RGB image, uint8[num_tiles, 3, p, p]: the global one, then row by row.

    The global tile is rounded to 8 bits, which nanoVLM's own, computed in floating point, is not:
    a difference of less than 1.5 of 255.

    Args:
        image: of any size. One that its decoder has reduced gets the tiling of its full size.
        resampling: the filter of the global tile; the image itself is resized by the bicubic one.
    """
    rows, columns = tiling.rows, tiling.columns
    resized = image.resize((columns * tile_size, rows * tile_size), RESAMPLING["bicubic"])
    grid = np.asarray(resized).reshape(rows, tile_size, columns, tile_size, 3)
    tiles = grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile_size, tile_size)
    if len(tiles) == 1:
        return tiles
    return np.concatenate([resize_to_uint8(resized, tile_size, resampling)[None], tiles])


def image_text(
    tilings: Sequence[Tiling], tokens: Mapping[str, str], num_image_tokens: int = 1
) -> str:
    """Return what stands for the images of a sample in its text.

    Args:
        tokens: as for `Tiling.markers`.
        num_image_tokens: of each tile. One is enough to find the tiles in a tokenized text.
    """
    of_tile = tokens["image_token"] * num_image_tokens
    texts = ["".join(marker + of_tile for marker in t.markers(tokens)) for t in tilings]
    if len(texts) == 1:
        return texts[0]
    return "".join(f"<image: {number}>{text}" for number, text in enumerate(texts))
