"""The decoder: a Llama in the form of SmolLM2.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, a head that may share the token
embedding, and a key-value cache.

Shapes: B sequences, T new tokens, S tokens in all (cached and new; S = T without a cache),
        D = lm_hidden_dim, H query heads and G key-value heads of width K = D / H,
        F = lm_inter_dim, V = lm_vocab_size. "B|1" is B, or 1 for what all sequences share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import VLMConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32[B|1, 1, T, K / 2] each."""


class KVCache:
    """Keys and values of the tokens read so far, so that each further token is read alone.

    Serves one batch. Each block's memory for `max_length` tokens is taken at its first use, in the
    type and on the device of its keys.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.num_tokens = 0
        """Tokens that all blocks have read, padding included."""
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one block's float[B, G, T, K]; return all of its float[B, G, S, K]."""
        start, end = self.num_tokens, self.num_tokens + keys.shape[2]
        assert end <= self.max_length, f"{end} tokens in a cache for {self.max_length}"
        if block not in self._blocks:
            shape = (*keys.shape[:2], self.max_length, keys.shape[3])
            self._blocks[block] = keys.new_empty(shape), values.new_empty(shape)
        all_keys, all_values = self._blocks[block]
        all_keys[:, :, start:end] = keys
        all_values[:, :, start:end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]


def positions_and_mask(
    num_cached: int, num_new: int, is_real: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return where the T new tokens stand and what each of them may look at.

    Args:
        is_real: bool or int [B, S], false where the sequence holds padding; None if nowhere.

    Returns:
        positions int[B|1, T], counting real tokens only, and the mask bool[B|1, 1, T, S]. The mask
        is None where none is needed: a plain causal prompt, or a single new token.
    """
    columns = torch.arange(num_cached + num_new, device=device)
    rows = columns[num_cached:, None]
    if is_real is None:
        plain = num_cached == 0 or num_new == 1
        return columns[None, num_cached:], None if plain else (columns <= rows)[None, None]
    is_real = is_real.bool()
    positions = (is_real.cumsum(dim=1) - 1).clamp(min=0)[:, num_cached:]
    # Padding sees itself: a softmax over nothing would be NaN, and spread from there.
    mask = (columns <= rows) & is_real[:, None, :] | (columns == rows)
    return positions, mask[:, None]


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
        """int[B|1, T] -> cosines and sines, float32[B|1, 1, T, K / 2]"""
        angles = positions[:, None, :, None].float() * self.inv_freq.float()
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (x[i], x[i + K / 2]), as Llama pairs them: float[B, H, T, K] -> the same."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)  # float32 from the product on, as cos and sin are
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


class Attention(nn.Module):
    """Causal attention; H / G query heads share each key-value head."""

    def __init__(self, config: VLMConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.head_dim = config.lm_hidden_dim // config.lm_n_heads
        self.dropout = config.lm_dropout
        kv_dim = config.lm_n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.lm_hidden_dim, config.lm_hidden_dim, bias=False)
        self.k_proj = nn.Linear(config.lm_hidden_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.lm_hidden_dim, kv_dim, bias=False)
        self.out_proj = nn.Linear(config.lm_hidden_dim, config.lm_hidden_dim, bias=False)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """float[B, T, D] -> float[B, T, D]; no mask means causal."""
        q = rotate(self._split_heads(self.q_proj(x)), rotary)  # (B, H, T, K)
        k = rotate(self._split_heads(self.k_proj(x)), rotary)  # (B, G, T, K)
        v = self._split_heads(self.v_proj(x))  # (B, G, T, K)
        if cache is not None:
            k, v = cache.extend(self.block, k, v)  # (B, G, S, K)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            # A single token after cached ones sees all; is_causal would show it the first key only.
            # (Without a cache the length is not asked: torch.compile would have to know it.)
            is_causal=mask is None and (cache is None or x.shape[1] > 1),
            enable_gqa=True,
        )
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(config.lm_inter_dim, config.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, T, D] -> float[B, T, D]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: VLMConfig, block: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.attn = Attention(config, block)
        self.norm2 = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.lm_dropout)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """float[B, T, D] -> float[B, T, D]"""
        x = x + self.dropout(self.attn(self.norm1(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LanguageModel(nn.Module):
    """Embeddings -> hidden states -> logits: `head(model(token_embedding(ids)))`."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.lm_vocab_size, config.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.lm_n_blocks))
        self.norm = RMSNorm(config.lm_hidden_dim, config.lm_rms_eps)
        self.head = nn.Linear(config.lm_hidden_dim, config.lm_vocab_size, bias=False)
        self.tied = config.lm_tie_weights
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the token embedding, if the configuration says so."""
        if self.tied:
            self.head.weight = self.token_embedding.weight

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the hidden states after the last norm: float[B, T, D] -> float[B, T, D].

        Args:
            x: embeddings of the new tokens.
            attention_mask: bool or int [B, S], true for real tokens, those in the cache included;
                padding may stand anywhere and is seen by no real token. None if all are real.
            cache: holds the tokens before `x`, and receives those of `x`.
        """
        num_new = x.shape[1]
        num_cached = 0 if cache is None else cache.num_tokens
        positions, mask = positions_and_mask(num_cached, num_new, attention_mask, x.device)
        rotary = self.rotary_embd(positions)
        for block in self.blocks:
            x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.num_tokens += num_new
        return self.norm(x)
