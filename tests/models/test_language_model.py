"""The decoder against transformers' Llama; padding, the key-value cache, the way into attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nanovlm.config import VLMConfig
from nanovlm.models.language_model import (
    KVCache,
    LanguageModel,
    RMSNorm,
    positions_and_mask,
    rotate,
)

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
    logits = model.head(model(model.token_embedding(ids)))
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
    hidden = model(model.token_embedding(ids), PADDED)
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=PADDED, position_ids=positions).logits
    assert hidden.isfinite().all()
    for row, real in enumerate(PADDED.bool()):
        logits = model.head(hidden[row, real])
        torch.testing.assert_close(logits, expected[row, real], atol=1e-5, rtol=1e-5)
        alone = model(model.token_embedding(ids[row, real][None]))[0]
        torch.testing.assert_close(hidden[row, real], alone, atol=1e-5, rtol=1e-5)


def test_positions_and_mask_of_padding() -> None:
    is_real = torch.tensor([[0, 1, 1, 0, 1]])
    positions, mask = positions_and_mask(2, 3, is_real, is_real.device)
    assert positions.tolist() == [[1, 1, 2]]
    assert mask is not None and mask.int().tolist() == [
        [[[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]]
    ]  # padding sees itself, and no one else sees it
    positions, mask = positions_and_mask(0, 2, is_real[:, :2], is_real.device)
    assert positions.tolist() == [[0, 0]]
    assert mask is not None and mask.int().tolist() == [[[[1, 0], [0, 1]]]]


def test_padding_sends_no_gradient_and_no_nan(tiny: VLMConfig) -> None:
    model = LanguageModel(tiny)
    x = model.token_embedding(token_ids(4, 8)).detach().requires_grad_()
    model(x, PADDED)[PADDED.bool()].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad[~PADDED.bool()] == 0).all() and (x.grad[PADDED.bool()] != 0).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [[8], [7, 1], [1] * 8, [3, 1, 4]])
@torch.no_grad()
def test_cache_equals_reading_all_at_once(tiny: VLMConfig, chunks: list[int], padded: bool) -> None:
    model = LanguageModel(tiny).eval()
    x = model.token_embedding(token_ids(4, 8))
    mask = PADDED if padded else None
    cache = KVCache(max_length=8)
    parts = []
    for chunk in x.split(chunks, dim=1):
        seen = cache.num_tokens + chunk.shape[1]
        parts.append(model(chunk, None if mask is None else mask[:, :seen], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x, mask), atol=1e-5, rtol=1e-5)
    assert cache.num_tokens == 8
    with pytest.raises(AssertionError, match="9 tokens in a cache for 8"):
        model(x[:, :1], None, cache)


@pytest.mark.parametrize(
    ("num_new", "cached", "expected"), [(5, 0, (None, True)), (1, 5, (None, False))]
)
def test_without_padding_attention_gets_no_mask(
    tiny: VLMConfig,
    monkeypatch: pytest.MonkeyPatch,
    num_new: int,
    cached: int,
    expected: tuple[None, bool],
) -> None:
    attend = F.scaled_dot_product_attention
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return attend(*args, **kwargs)

    model = LanguageModel(tiny)
    cache = KVCache(max_length=10)
    if cached:
        model(torch.rand(2, cached, 32), None, cache)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(torch.rand(2, num_new, 32), None, cache)
    assert seen == [expected] * tiny.lm_n_blocks


def test_norm_and_rotation_keep_float32_inside(tiny: VLMConfig) -> None:
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    rotary = LanguageModel(tiny).rotary_embd(torch.tensor([[5000, 5001, 5002]]))
    assert rotary[0].dtype == torch.float32
    half = x.bfloat16()
    assert torch.equal(rotate(half, rotary), rotate(half.float(), rotary).bfloat16())
    norm = RMSNorm(8, 1e-5)
    assert torch.equal(norm(half), norm(half.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = LanguageModel(tiny).rotary_embd(torch.tensor([[5000, 5001, 5002]]))
    assert torch.equal(autocast[0], rotary[0]) and torch.equal(autocast[1], rotary[1])


def test_dropout_acts_in_training_only(tiny: VLMConfig) -> None:
    model = LanguageModel(dataclasses.replace(tiny, lm_dropout=0.5))
    x = torch.rand(1, 6, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
