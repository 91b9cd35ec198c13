"""From the vision encoder's patches to the decoder's tokens: pixel shuffle, then one matrix.

Shapes: B images, N patches, D = vit_hidden_dim, f = mp_pixel_shuffle_factor,
        I = N / f^2 image tokens, L = lm_hidden_dim.
"""

import math

from torch import Tensor, nn

from nanovlm.config.schema import VLMConfig


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Join each factor x factor block of patches into one token: fewer tokens, wider ones.

    Tokens come out row by row; a token's channels are ordered (row in block, column in block,
    channel).

    float[B, N, D] -> float[B, N / factor^2, factor^2 * D]
    """
    batch, num_patches, dim = x.shape
    side = math.isqrt(num_patches)
    assert side * side == num_patches, f"{num_patches} patches are not a square grid"
    assert side % factor == 0, f"a factor of {factor} does not divide a grid of side {side}"
    blocks = side // factor
    x = x.reshape(batch, blocks, factor, blocks, factor, dim)
    x = x.transpose(2, 3)  # (B, block row, block column, row in block, column in block, D)
    return x.reshape(batch, blocks * blocks, factor * factor * dim)


class ModalityProjector(nn.Module):
    """Patches -> vectors that stand beside the decoder's token embeddings."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.factor = config.mp_pixel_shuffle_factor
        self.proj = nn.Linear(
            config.vit_hidden_dim * self.factor**2, config.lm_hidden_dim, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, I, L]"""
        return self.proj(pixel_shuffle(x, self.factor))
