"""Tiles of images: the published rule, written a second time and slowly, on many sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nanovlm.config.generations import V8K
from nanovlm.data.tiles import Tiling, cut_into_tiles, image_text, tile_image

SIZES = [
    *((1, 1), (1, 2), (2, 1), (3, 3), (7, 5), (31, 33), (511, 511), (512, 512), (513, 512)),
    *((512, 513), (513, 513), (1, 512), (1, 513), (1, 4000), (4000, 1), (2, 8191), (8192, 3)),
    *((1024, 1024), (1023, 1025), (1025, 1023), (1092, 1092), (1100, 1100), (1179, 1179)),
    *((640, 480), (480, 640), (800, 600), (1920, 1080), (1080, 1920), (3160, 2136), (114, 66)),
    *((2047, 2048), (2048, 2047), (2049, 2048), (2048, 511), (2048, 513), (2560, 1440)),
    *((3000, 100), (100, 3000), (4096, 4096), (8192, 8192)),
]
"""Width and height."""
SETTINGS = [(512, 2048, False), (512, 2048, True), (512, 1536, False), (16, 128, False)]
"""Side of a tile, longest side, whether small images are enlarged."""


def published_size(w: int, h: int, p: int, m: int, enlarge: bool) -> tuple[int, int]:
    """Return width and height of the resized image."""
    long, short = (w, h) if w >= h else (h, w)
    sides = []
    multiples = 1
    while multiples * p < long:
        multiples += 1
    sides.append(m if enlarge or multiples * p > m else multiples * p)
    scale = sides[0] / long
    multiples = 1
    while multiples < short * scale / p and multiples < 8:
        multiples += 1
    sides.append(multiples * p)
    return (sides[0], sides[1]) if w >= h else (sides[1], sides[0])


def published_text(grids: list[tuple[int, int]], num_tokens: int) -> str:
    text = ""
    for number, (rows, columns) in enumerate(grids):
        if len(grids) > 1:
            text += "<image: " + str(number) + ">"
        text += "<|global_image|>" + "<|image|>" * num_tokens
        if (rows, columns) != (1, 1):
            for row in range(rows):
                for column in range(columns):
                    text += "<row_" + str(row + 1) + "_col_" + str(column + 1) + ">"
                    text += "<|image|>" * num_tokens
    return text


@pytest.mark.parametrize(("p", "m", "enlarge"), SETTINGS)
def test_grid_and_text_are_the_published_ones(p: int, m: int, enlarge: bool) -> None:
    assert len(SIZES) == 40
    for w, h in SIZES:
        tiling = tile_image(w, h, p, m, enlarge)
        target = published_size(w, h, p, m, enlarge)
        assert (tiling.columns * p, tiling.rows * p) == target, (w, h)
        assert max(target) <= m or w == h
        assert 1 <= min(tiling.rows, tiling.columns) <= max(tiling.rows, tiling.columns) <= 8
        grid = (tiling.rows, tiling.columns)
        expected = published_text([grid], 64)
        assert image_text([tiling], V8K.extra_tokens, 64) == expected
        assert tiling.num_tiles == expected.count("<|image|>") / 64


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((512, 512), (1, 1)),
        ((513, 512), (2, 2)),
        ((1, 4000), (4, 1)),
        ((4000, 1), (1, 4)),
        ((8192, 8192), (4, 4)),
        ((1920, 1080), (3, 4)),
        ((640, 480), (2, 2)),
        ((800, 400), (1, 2)),
        # 1092 * (1536 / 1092) is a little above 1536 in doubles, which nanoVLM calculates in.
        ((1092, 1092), (4, 3)),
        ((1091, 1091), (3, 3)),
    ],
)
def test_known_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    tiling = tile_image(*size, 512, 2048)
    assert (tiling.rows, tiling.columns) == grid


def test_texts_of_several_images_are_numbered() -> None:
    grids = [(1, 1), (2, 3), (1, 2)]
    tilings = [Tiling(*grid) for grid in grids]
    assert image_text(tilings, V8K.extra_tokens, 4) == published_text(grids, 4)
    assert image_text(tilings, V8K.extra_tokens).count("<|image|>") == 1 + 7 + 3
    assert image_text([], V8K.extra_tokens) == ""
    assert image_text(tilings[:1], V8K.extra_tokens) == "<|global_image|><|image|>"
    assert [tiling.num_tiles for tiling in tilings] == [1, 7, 3]


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (33, 20), (20, 47), (1, 100), (300, 200)])
def test_tiles_are_the_resized_image_row_by_row(size: tuple[int, int]) -> None:
    p = 16
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    tiling = tile_image(*size, p, 64)
    tiles = cut_into_tiles(image, tiling, p, "bilinear")
    assert tiles.dtype == np.uint8 and tiles.shape == (tiling.num_tiles, 3, p, p)
    width, height = published_size(*size, p, 64, False)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    found = iter(tiles if (width, height) == (p, p) else tiles[1:])
    for top in range(0, height, p):
        for left in range(0, width, p):
            expected = resized.crop((left, top, left + p, top + p))
            tile = next(found)
            np.testing.assert_array_equal(np.asarray(expected), tile.transpose(1, 2, 0))
    assert next(found, None) is None


def test_the_global_tile_is_that_of_torch_but_for_rounding() -> None:
    """nanoVLM squashes by torchvision, which takes this function of torch."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    image, tiling = Image.fromarray(noise), tile_image(300, 200, 16, 64)
    resized = image.resize((tiling.columns * 16, tiling.rows * 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()
    expected = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    found = torch.from_numpy(cut_into_tiles(image, tiling, 16, "bilinear")[0].copy())
    assert (found - expected[0]).abs().max() < 1.5
