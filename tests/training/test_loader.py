"""The way of batches to the device, and the shapes that they take."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanovlm.data.samples import ImageSlots, PreparedSamples, collate
from nanovlm.training.forward import ModelInput, model_input
from nanovlm.training.loader import Loader
from nanovlm.training.shapes import FixedCount
from tests.tiny import vlm_config

CPU = torch.device("cpu")
TINY = vlm_config(vit_patch_size=4, vit_img_size=8, lm_vocab_size=32, lm_max_length=100)
NUM_SAMPLES = 400
LONGEST = 80


@pytest.fixture(scope="module")
def samples() -> PreparedSamples:
    """Many short texts and few long ones, as real data has them: 2 to 81 tokens, EOS included."""
    generator = torch.Generator().manual_seed(1)
    lengths = 2 + (79 * torch.rand(NUM_SAMPLES, generator=generator) ** 3).round().long()
    lengths[17] = LONGEST + 1
    return PreparedSamples(
        images=torch.randint(256, (NUM_SAMPLES, 3, 8, 8), generator=generator, dtype=torch.uint8),
        slots=ImageSlots.one_each(torch.arange(NUM_SAMPLES)),
        tokens=torch.randint(32, (int(lengths.sum()),), generator=generator),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        prompt_lengths=lengths - 1,
    )


def assert_equal(inputs: ModelInput, expected: ModelInput) -> None:
    pairs = zip(inputs.tensors(), expected.tensors(), strict=True)
    assert all(torch.equal(tensor, other) for tensor, other in pairs)


def plain_input(samples: PreparedSamples, indices: np.ndarray) -> ModelInput:
    return model_input(collate(samples, indices), TINY)


def test_what_is_taken_is_what_was_asked_for_fetched_or_not(samples: PreparedSamples) -> None:
    loader = Loader(samples, TINY, CPU)
    one, other, longer = np.array([3, 1, 2]), np.array([3, 1, 4]), np.arange(9)
    loader.fetch(one)
    assert_equal(loader.take(one), plain_input(samples, one))
    assert_equal(loader.take(one), plain_input(samples, one))
    loader.fetch(one)
    assert_equal(loader.take(other), plain_input(samples, other))
    assert_equal(loader.take(longer), plain_input(samples, longer))
    assert_equal(loader.take(one), plain_input(samples, one))


def test_each_batch_is_waited_for_once(samples: PreparedSamples) -> None:
    num_waits = 0

    @contextmanager
    def waiting() -> Iterator[None]:
        nonlocal num_waits
        num_waits += 1
        yield

    loader = Loader(samples, TINY, CPU, waiting=waiting)
    loader.fetch(np.arange(3))
    loader.take(np.arange(3))
    loader.take(np.arange(5))
    assert num_waits == 2


@pytest.mark.parametrize("num_samples", [1, 2, 8, 64])
def test_batches_have_two_shapes_at_most_and_nearly_always_one(
    samples: PreparedSamples, num_samples: int
) -> None:
    loader = Loader(samples, TINY, CPU, has_fixed_shapes=True, has_fixed_labels=True)
    generator = np.random.default_rng(0)
    batches = [generator.choice(NUM_SAMPLES, num_samples, replace=False) for _ in range(300)]
    longest = samples.text_lengths.argsort()[-num_samples:].numpy()
    usual = {shapes(loader.take(indices)) for indices in batches}
    assert len(usual) == 1
    assert len(usual | {shapes(loader.take(longest))}) == (1 if num_samples < 8 else 2)


def shapes(inputs: ModelInput) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in inputs.tensors())


def test_fixed_shapes_hold_the_same_samples(samples: PreparedSamples) -> None:
    """And a few tokens of padding, which carry no label."""
    indices = np.arange(100)
    inputs = Loader(samples, TINY, CPU, has_fixed_shapes=True).take(indices)
    expected = plain_input(samples, indices)
    num_real = int(samples.text_lengths[indices].sum())
    assert num_real < len(inputs.token_ids) < 2 * num_real
    assert torch.equal(inputs.token_ids[:num_real], expected.token_ids[:num_real])
    assert torch.equal(inputs.label_index, expected.label_index)
    assert torch.equal(inputs.labels, expected.labels)


def test_little_padding_in_large_batches() -> None:
    text = FixedCount(mean=30, deviation=20, most=78)
    assert text.room(1, 50) == text.room(1, 78) == 80
    assert text.room(256, 256 * 30) == 8976 == 16 * 561  # 7680 + 4 x 20 x 16 + 1, rounded up
    assert text.room(256, 8960) == 8976
    assert text.room(256, 8961) == text.room(256, 256 * 78) == 19984


def test_samples_of_one_length_need_no_room(samples: PreparedSamples) -> None:
    shapes = FixedCount(mean=7, deviation=0, most=7)
    assert shapes.room(9, 63) == 64
