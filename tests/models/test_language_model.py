"""The decoder against transformers' Llama; padding, the key-value cache, the way into attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nanovlm.config.schema import VLMConfig
from nanovlm.models.language_model import (
    KVCache,
    LanguageModel,
    RMSNorm,
    rotate,
)
from nanovlm.models.packing import pack

RENAMED = {
    "model.embed_tokens": "token_embedding",
    "model.layers": "blocks",
    "self_attn.o_proj": "attn.out_proj",
    "self_attn": "attn",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "model.norm": "norm",
    "lm_head": "head",
}


def ours(theirs: dict[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """Return Llama's weights under our names, with our own rotary frequencies."""
    weights = {"rotary_embd.inv_freq": model.rotary_embd.inv_freq}
    for name, weight in theirs.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights[name] = weight
    return weights


def llama_and_ours(
    config: VLMConfig, randomize: Callable[[nn.Module], None]
) -> tuple[LlamaForCausalLM, LanguageModel]:
    reference = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.lm_hidden_dim,
            intermediate_size=config.lm_inter_dim,
            num_hidden_layers=config.lm_n_blocks,
            num_attention_heads=config.lm_n_heads,
            num_key_value_heads=config.lm_n_kv_heads,
            vocab_size=config.lm_vocab_size,
            rms_norm_eps=config.lm_rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.lm_re_base},
            tie_word_embeddings=config.lm_tie_weights,
        )
    ).eval()
    randomize(reference)
    reference.model.rotary_emb.attention_scaling = config.lm_attn_scaling
    model = LanguageModel(config).eval()
    model.load_state_dict(ours(reference.state_dict(), model))
    return reference, model


def read(
    model: LanguageModel, ids: Tensor, is_real: Tensor | None = None, cache: KVCache | None = None
) -> Tensor:
    """Return the hidden states float[B, T, D] of texts that are packed first; 0 for padding."""
    is_real = torch.ones_like(ids, dtype=torch.bool) if is_real is None else is_real.bool()
    row = F.pad(ids[is_real], (0, 1))
    packing = pack(is_real.sum(1), 0, len(row))
    real = model(model.token_embedding(row), packing, cache)[:-1]
    hidden = real.new_zeros((*ids.shape, real.shape[1]))
    return hidden.masked_scatter(is_real[..., None], real)


def token_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 33),  # 4 query heads on 2
        ({"lm_n_kv_heads": 4}, 7),  # as many
        ({"lm_n_kv_heads": 1, "lm_tie_weights": True}, 16),
        ({"lm_hidden_dim": 48, "lm_n_heads": 3, "lm_n_kv_heads": 3, "lm_tie_weights": True}, 1),
        ({"lm_re_base": 100.0, "lm_attn_scaling": 1.3, "lm_rms_eps": 0.1, "lm_n_blocks": 3}, 40),
    ],
)
@torch.no_grad()
def test_equals_llama(
    tiny: VLMConfig,
    randomize: Callable[[nn.Module], None],
    changes: dict[str, Any],
    length: int,
) -> None:
    config = dataclasses.replace(tiny, **changes)
    reference, model = llama_and_ours(config, randomize)
    ids = token_ids(2, length)
    logits = model.head(read(model, ids))
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-5, rtol=1e-5)


PADDED = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1, 0], [1] * 8]
)
"""Padding on the left, on the right, in the middle, and none."""


@torch.no_grad()
def test_padding_equals_llama_and_no_padding(
    tiny: VLMConfig, randomize: Callable[[nn.Module], None]
) -> None:
    reference, model = llama_and_ours(tiny, randomize)
    ids = token_ids(4, 8)
    hidden = read(model, ids, PADDED)
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=PADDED, position_ids=positions).logits
    assert hidden.isfinite().all()
    for row, real in enumerate(PADDED.bool()):
        logits = model.head(hidden[row, real])
        torch.testing.assert_close(logits, expected[row, real], atol=1e-5, rtol=1e-5)
        alone = read(model, ids[row, real][None])[0]
        torch.testing.assert_close(hidden[row, real], alone, atol=1e-5, rtol=1e-5)


def test_padding_sends_no_gradient_and_no_nan(tiny: VLMConfig) -> None:
    model = LanguageModel(tiny)
    lengths = torch.tensor([5, 1, 8])
    packing = pack(lengths, 0, 20)  # 14 real tokens and 6 of padding
    x = model.token_embedding(token_ids(20)).detach().requires_grad_()
    model(x, packing)[:14].square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad[14:] == 0).all() and (x.grad[:14] != 0).any(dim=1).all()


@pytest.mark.parametrize("num_read", [1, 3, 7])
@torch.no_grad()
def test_cache_equals_reading_all_at_once(tiny: VLMConfig, num_read: int) -> None:
    """Samples of 8, 5 and 1 further tokens less: what each reads next depends on itself alone."""
    model = LanguageModel(tiny).eval()
    lengths = torch.tensor([num_read, 1, max(1, num_read - 2)])
    ids = token_ids(3, 12)
    is_read = torch.arange(12) < lengths[:, None]
    cache = KVCache(lengths, room=5)
    read(model, ids, is_read, cache)
    for step in range(5):
        places = lengths + step
        token = ids[torch.arange(3), places]
        hidden = model.step(model.token_embedding(token), cache)
        expected = read(model, ids, torch.arange(12) <= places[:, None])
        expected = expected[torch.arange(3), places]
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.lengths, lengths + 5)


def test_attention_over_a_row_gets_no_mask(
    tiny: VLMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask the fast kernels would not be taken."""
    attend = F.scaled_dot_product_attention
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs.get("attn_mask"), kwargs["is_causal"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    read(LanguageModel(tiny), token_ids(4, 8), PADDED.bool())
    assert seen == [(None, True)] * tiny.lm_n_blocks


def test_norm_and_rotation_keep_float32_inside(tiny: VLMConfig) -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    rotary = LanguageModel(tiny).rotary_embd(torch.tensor([5000, 5001, 5002]))
    assert rotary[0].dtype == torch.float32
    half = x.bfloat16()
    assert torch.equal(rotate(half, rotary), rotate(half.float(), rotary).bfloat16())
    norm = RMSNorm(8, 1e-5)
    assert torch.equal(norm(half), norm(half.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = LanguageModel(tiny).rotary_embd(torch.tensor([5000, 5001, 5002]))
    assert torch.equal(autocast[0], rotary[0]) and torch.equal(autocast[1], rotary[1])


def test_dropout_acts_in_training_only(tiny: VLMConfig) -> None:
    model = LanguageModel(dataclasses.replace(tiny, lm_dropout=0.5))
    ids = token_ids(1, 6)
    assert not torch.equal(read(model, ids), read(model, ids))
    model.eval()
    assert torch.equal(read(model, ids), read(model, ids))
