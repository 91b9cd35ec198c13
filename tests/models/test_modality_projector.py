"""The pixel shuffle against the loops that say what it does."""

import pytest
import torch
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.models.modality_projector import ModalityProjector, pixel_shuffle


def shuffled_by_loops(x: Tensor, factor: int) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    tokens = []
    for top in range(0, side, factor):
        for left in range(0, side, factor):
            rows, columns = range(top, top + factor), range(left, left + factor)
            patches = [x[:, row * side + column] for row in rows for column in columns]
            tokens.append(torch.cat(patches, dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize(("side", "factor", "dim"), [(4, 2, 3), (6, 3, 5), (14, 2, 2), (5, 1, 4)])
def test_pixel_shuffle(side: int, factor: int, dim: int) -> None:
    x = torch.arange(2 * side * side * dim).view(2, side * side, dim)
    actual = pixel_shuffle(x, factor)
    assert actual.shape == (2, (side // factor) ** 2, dim * factor**2)
    assert torch.equal(actual, shuffled_by_loops(x, factor))


def test_pixel_shuffle_needs_a_grid_that_the_factor_divides() -> None:
    with pytest.raises(AssertionError, match="15 patches"):
        pixel_shuffle(torch.zeros(1, 15, 2), 1)
    with pytest.raises(AssertionError, match="factor of 2"):
        pixel_shuffle(torch.zeros(1, 9, 2), 2)


def test_projector_maps_patches_to_the_decoders_width(tiny: VLMConfig) -> None:
    projector = ModalityProjector(tiny)
    patches = torch.rand(2, 16, tiny.vit_hidden_dim)
    tokens = projector(patches)
    assert tokens.shape == (2, tiny.num_image_tokens, tiny.lm_hidden_dim)
    expected = shuffled_by_loops(patches, 2) @ projector.proj.weight.T
    torch.testing.assert_close(tokens, expected)
    assert projector.proj.bias is None
