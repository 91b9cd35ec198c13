"""The decoder: a Llama in the form of SmolLM2.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, a head that may share the token
embedding, and a key-value cache. It reads samples packed into one row (`models/packing.py`) and
then, for generation, one further token of each sample at a time.

Shapes: B samples, N tokens of the row, padding included, T tokens of a padded sequence, S tokens
        that the cache has room for, D = lm_hidden_dim, H query heads and G key-value heads
        of width K = D / H, F = lm_inter_dim, V = lm_vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.models.compiled import Run, RunBlock, call, run_block
from nanovlm.models.packing import Packing, pad, unpad

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32[N, 1, K / 2] each."""


class KVCache:
    """Keys and values of what B samples have read, so that each further token is read alone."""

    def __init__(self, lengths: Tensor, room: int) -> None:
        """Hold nothing yet.

        Args:
            lengths: int64[B], tokens of each sample that the decoder is about to read, on its
                device.
            room: further tokens that will follow.
        """
        self.lengths = lengths
        self._room = room
        self._blocks: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def fill(self, attention: nn.Module, keys: Tensor, values: Tensor) -> None:
        """Take in a block's padded views, float[B + 1, G, T, K], without the last sequence."""
        keys, values = (F.pad(padded[:-1], (0, 0, 0, self._room)) for padded in (keys, values))
        self._blocks[attention] = keys, values

    def extend(self, attention: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a token of each sample, float[B, G, K]; return all of the block's float[B, G, S, K].

        Positions after the new token are not set.
        """
        keys, values = self._blocks[attention]
        samples = torch.arange(len(self.lengths), device=key.device)
        keys[samples, :, self.lengths] = key
        values[samples, :, self.lengths] = value
        return keys, values

    def seen(self) -> Tensor:
        """Return what the next token of each sample may look at, itself included: bool[B, S]"""
        keys, _ = next(iter(self._blocks.values()))
        return torch.arange(keys.shape[2], device=keys.device) <= self.lengths[:, None]


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class RotaryEmbedding(nn.Module):
    """Angles by which queries and keys turn: position x frequency, in float32."""

    inv_freq: Tensor

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.head_dim = config.lm_hidden_dim // config.lm_n_heads
        self.base = config.lm_re_base
        self.scaling = config.lm_attn_scaling
        # Persistent, since published checkpoints hold it.
        self.register_buffer("inv_freq", torch.empty(self.head_dim // 2))
        self.reset()

    def reset(self) -> None:
        """Set the frequencies base^(-2i / K), in place."""
        exponents = torch.arange(0, self.head_dim, 2, device="cpu").float() / self.head_dim
        self.inv_freq.copy_(1.0 / self.base**exponents)

    def forward(self, positions: Tensor) -> Rotary:
        """int[N] -> cosines and sines, float32[N, 1, K / 2]"""
        angles = positions[:, None, None].float() * self.inv_freq.float()
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (x[i], x[i + K / 2]), as Llama pairs them: float[N, H, K] -> the same."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)  # float32 from the product on, as cos and sin are
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


class Attention(nn.Module):
    """Causal attention; H / G query heads share each key-value head."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.head_dim = config.lm_hidden_dim // config.lm_n_heads
        self.dropout = config.lm_dropout
        kv_dim = config.lm_n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.lm_hidden_dim, config.lm_hidden_dim, bias=False)
        self.k_proj = nn.Linear(config.lm_hidden_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.lm_hidden_dim, kv_dim, bias=False)
        self.out_proj = nn.Linear(config.lm_hidden_dim, config.lm_hidden_dim, bias=False)

    def read(self, x: Tensor, rotary: Rotary, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """float[N, D] -> padded views: queries float[B + 1, H, T, K], keys and values with G"""
        q, k, v = (pad(part, packing) for part in self._project(x, rotary))
        return q, k, v

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let each token look at those before it in its sequence -> float[B + 1, H, T, K]"""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True
        )

    def write(self, y: Tensor, packing: Packing) -> Tensor:
        """float[B + 1, H, T, K] -> float[N, D]"""
        return self.out_proj(unpad(y, packing).flatten(1))

    def step(self, x: Tensor, rotary: Rotary, cache: KVCache, seen: Tensor) -> Tensor:
        """Let a further token of each sample look at what is cached: float[B, D] -> the same.

        seen: bool[B, S]
        """
        q, k, v = self._project(x, rotary)
        keys, values = cache.extend(self, k, v)
        y = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )  # (B, H, 1, K)
        return self.out_proj(y.flatten(1))

    def _project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """float[N, D] -> queries float[N, H, K], keys and values float[N, G, K]"""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, rotary), rotate(k, rotary), v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(config.lm_inter_dim, config.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[N, D] -> float[N, D]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.lm_dropout)

    def drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        packing: Packing,
        cache: KVCache | None = None,
        run: Run = call,
    ) -> Tensor:
        """Let each token of a row look at those before it in its sample: float[N, D] -> the same.

        Args:
            cache: receives the keys and values.
            run: see `models/compiled.py`.
        """
        q, k, v = run(Block._read, self, x, rotary, packing)
        if cache is not None:
            cache.fill(self.attn, k, v)
        y = self.attn.look(q, k, v)
        x = x + self.dropout(run(Attention.write, self.attn, y, packing))
        return x + self.dropout(run(Block._transform, self, x))

    def _read(self, x: Tensor, rotary: Rotary, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.read(self.norm1(x), rotary, packing)

    def _transform(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.norm2(x))
        return output

    def step(self, x: Tensor, rotary: Rotary, cache: KVCache, seen: Tensor) -> Tensor:
        """float[B, D] -> float[B, D]"""
        x = x + self.attn.step(self.norm1(x), rotary, cache, seen)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Embeddings -> hidden states -> logits: `head(model(token_embedding(ids), packing))`."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.lm_vocab_size, config.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.lm_n_blocks))
        self.norm = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.head = nn.Linear(config.lm_hidden_dim, config.lm_vocab_size, bias=False)
        self.run_block: RunBlock = run_block
        self.tied = config.lm_tie_weights
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the token embedding with the head, if the configuration says so."""
        if self.tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, x: Tensor, packing: Packing, cache: KVCache | None = None) -> Tensor:
        """Return the hidden states after the last norm: float[N, D] -> float[N, D].

        Args:
            x: embeddings of a row.
            cache: empty, with the lengths of the row's samples; receives their keys and values.
        """
        rotary = self.rotary_embd(packing.positions)
        for block in self.blocks:
            if cache is None:
                x = self.run_block(block, x, rotary, packing)
            else:
                x = block(x, rotary, packing, cache)
        return self.norm(x)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Read a further token of each sample: float[B, D] -> float[B, D].

        Args:
            x: its embeddings.
            cache: what the samples have read before; receives the token.
        """
        rotary = self.rotary_embd(cache.lengths)
        seen = cache.seen()
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block.step(x, rotary, cache, seen)
        cache.lengths = cache.lengths + 1
        return self.norm(x)
