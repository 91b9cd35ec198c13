"""The vision encoder: SigLIP's vision transformer, without its pooling head.

Shapes: B images, C = 3 channels, S side in pixels, N patches, D = vit_hidden_dim,
        H heads of width K = D / H, F = vit_mlp_dim.
"""

import torch.nn.functional as F
from torch import Tensor, empty, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.models.compiled import Run, RunBlock, call, run_block


class PatchEmbedding(nn.Module):
    """Cut an image into patches, row by row, and project each; add its learned position."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        size = config.vit_patch_size
        num_patches = (config.vit_img_size // size) ** 2
        self.conv = nn.Conv2d(3, config.vit_hidden_dim, kernel_size=size, stride=size)
        self.position_embedding = nn.Parameter(empty(1, num_patches, config.vit_hidden_dim))
        nn.init.normal_(self.position_embedding, std=config.vit_hidden_dim**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, D]"""
        patches = self.conv(image).flatten(2).transpose(1, 2)  # (B, N, D)
        return patches + self.position_embedding


class Attention(nn.Module):
    """Every patch looks at every patch."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.num_heads = config.vit_n_heads
        self.dropout = config.vit_dropout
        self.qkv_proj = nn.Linear(config.vit_hidden_dim, 3 * config.vit_hidden_dim)
        self.out_proj = nn.Linear(config.vit_hidden_dim, config.vit_hidden_dim)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float[B, N, D] -> queries, keys and values, float[B, H, N, K] each"""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let every patch look at every patch -> float[B, H, N, K]"""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    def write(self, y: Tensor) -> Tensor:
        """float[B, H, N, K] -> float[B, N, D]"""
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with the tanh form of GELU, as SigLIP was trained."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.vit_hidden_dim, config.vit_mlp_dim)
        self.fc2 = nn.Linear(config.vit_mlp_dim, config.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, N, D] -> float[B, N, D]"""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.vit_dropout)

    def drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def forward(self, x: Tensor, run: Run = call) -> Tensor:
        """float[B, N, D] -> float[B, N, D]; for `run` see `models/compiled.py`."""
        y = self.attn.look(*run(Block._read, self, x))
        x = x + self.dropout(run(Attention.write, self.attn, y))
        return x + self.dropout(run(Block._transform, self, x))

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.read(self.ln1(x))

    def _transform(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.ln2(x))
        return output


class ViT(nn.Module):
    """Image -> one vector a patch. There is no class token: the projector needs the whole grid."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.dropout = nn.Dropout(config.vit_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.run_block: RunBlock = run_block

    def forward(self, image: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, N, D], patches row by row"""
        x = self.dropout(self.patch_embedding(image))
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.layer_norm(x)
