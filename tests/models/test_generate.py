"""Generation: the cache against none, EOS, sampling."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.models.packing import pack
from nanovlm.models.vision_language_model import VisionLanguageModel, sample

NO_TOKEN = 49
"""An EOS that the model of these tests never chooses."""


@pytest.fixture
def model(tiny: VLMConfig, randomize: Callable[[nn.Module], None]) -> VisionLanguageModel:
    """A model whose greedy tokens vary, and that never ends by itself."""
    model = VisionLanguageModel(dataclasses.replace(tiny, lm_eos_token_id=NO_TOKEN)).eval()
    randomize(model)
    with torch.no_grad():
        model.decoder.head.weight[NO_TOKEN] = 0.0
    return model


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(49, (3, 6), generator=generator)
    return ids, torch.rand(3, 3, 32, 32, generator=generator)


def with_eos(model: VisionLanguageModel, eos: int) -> VisionLanguageModel:
    model.config = dataclasses.replace(model.config, lm_eos_token_id=eos)
    return model


def last_logits(model: VisionLanguageModel, ids: Tensor, image: Tensor) -> Tensor:
    """Return the logits behind prompts of one length, which may be 0."""
    packing = pack(torch.full((len(ids),), ids.shape[1]), 4, ids.numel() + 1)
    hidden = model.decoder(model.embed(F.pad(ids.flatten(), (0, 1)), image), packing)
    return model.decoder.head(hidden[packing.last])


@torch.no_grad()
def greedy_without_cache(
    model: VisionLanguageModel, ids: Tensor, image: Tensor, num_tokens: int
) -> Tensor:
    prompt_length = ids.shape[1]
    for _ in range(num_tokens):
        token = last_logits(model, ids, image).argmax(dim=-1)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return ids[:, prompt_length:]


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_cache_equals_none(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor], num_tokens: int
) -> None:
    expected = greedy_without_cache(model, *prompt, num_tokens)
    assert torch.equal(model.generate(*prompt, max_new_tokens=num_tokens), expected)
    assert num_tokens == 1 or len(expected.unique()) > 5


@torch.no_grad()
def test_a_prefill_has_the_logits_behind_the_prompt(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor]
) -> None:
    ids, image = prompt
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    logits, _ = model(ids, image, mask)
    row = F.pad(ids[mask.bool()], (0, 1))
    prefill = model.prefill(row, image, pack(mask.sum(1), 4, len(row)), max_new_tokens=3)
    expected = logits[torch.arange(3), torch.tensor([5, 3, 0])]
    torch.testing.assert_close(prefill.logits, expected, atol=1e-5, rtol=0)
    completed = model.complete(prefill, 3)
    assert torch.equal(completed, model.generate(ids, image, mask, max_new_tokens=3))
    assert torch.equal(completed[:, 0], prefill.logits.argmax(dim=1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_as_if_alone(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor], side: str
) -> None:
    ids, image = prompt
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, length in enumerate((6, 2, 0)):
        mask[row, slice(6 - length, 6) if side == "left" else slice(length)] = 1
    generated = model.generate(ids, image, mask, max_new_tokens=6)
    for row in range(3):
        real = ids[row, mask[row].bool()][None]
        expected = greedy_without_cache(model, real, image[row : row + 1], 6)
        assert torch.equal(generated[row], expected[0])


def test_a_row_that_ends_is_filled_with_eos(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor]
) -> None:
    free = model.generate(*prompt, max_new_tokens=8)
    eos = int(free[0, 2])
    ended = with_eos(model, eos).generate(*prompt, max_new_tokens=8)
    for row in range(3):
        ends = (free[row] == eos).nonzero()
        end = int(ends[0]) if len(ends) else 8
        assert torch.equal(ended[row, :end], free[row, :end])
        assert (ended[row, end:] == eos).all()
    assert (ended[0] == eos).sum() >= 6
    assert not (ended == eos).all(dim=1).any()


def test_generation_ends_when_all_rows_have(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor]
) -> None:
    ids, image = prompt[0][:1], prompt[1][:1]
    free = model.generate(ids, image, max_new_tokens=8)
    first = int((free[0] == free[0, 3]).nonzero()[0])
    ended = with_eos(model, int(free[0, 3])).generate(ids, image, max_new_tokens=8)
    assert torch.equal(ended, free[:, : first + 1])


def test_sampling_repeats_under_a_generator(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor]
) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        model.generate(*prompt, greedy=False, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_likeliest_token_is_greedy(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor]
) -> None:
    greedy = model.generate(*prompt)
    generator = torch.Generator().manual_seed(0)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampled = model.generate(*prompt, greedy=False, generator=generator, **limits)
        assert torch.equal(sampled, greedy), limits


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_k": 9}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_p": 0.5}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_k": 3, "top_p": 0.9}, [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),
    ],
)
def test_tokens_are_drawn_as_often_as_likely(limits: dict, expected: list[float]) -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(20_000, 4)
    drawn = sample(logits, **limits, generator=torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.015, rtol=0)
    assert (shares[torch.tensor(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, or None, got 1.5"),
    ],
)
def test_settings_out_of_range(
    model: VisionLanguageModel, prompt: tuple[Tensor, Tensor], setting: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(*prompt, **setting)
