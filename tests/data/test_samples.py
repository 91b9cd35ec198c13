"""The order of the training stream, and batches against a naive reference."""

import numpy as np
import pytest
import torch

from nanovlm.data.samples import (
    ImageSlots,
    PreparedSamples,
    collate,
    image_buffer,
    samples_in_order,
)

PROMPTS = [[5, 6, 7], [5], [8, 8, 8, 8, 8, 8, 8, 8], [9, 0, 9]]
ANSWERS = [[1, 0], [2, 3, 0], [4, 0], [0]]
"""With EOS, which is 0 and also stands inside a prompt."""


@pytest.fixture
def samples() -> PreparedSamples:
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    lengths = [len(text) for text in texts]
    return PreparedSamples(
        images=torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).reshape(3, 3, 2, 2),
        slots=ImageSlots.one_each(torch.tensor([0, 2, 2, 1])),
        tokens=torch.tensor([token for text in texts for token in text]),
        offsets=torch.tensor([0, *np.cumsum(lengths)]),
        prompt_lengths=torch.tensor([len(prompt) for prompt in PROMPTS]),
    )


def naive_texts(indices: list[int], num_padding: int) -> tuple[list[int], list[int]]:
    """Return token_ids and targets, token by token."""
    inputs, targets = [], []
    for i in indices:
        inputs += (PROMPTS[i] + ANSWERS[i])[:-1]
        targets += [-100] * (len(PROMPTS[i]) - 1) + ANSWERS[i]
    return inputs + [0] * num_padding, targets + [-100] * num_padding


@pytest.mark.parametrize(
    ("indices", "num_text", "num_padding"),
    [
        ([0], None, 1),
        ([0], 8, 4),
        ([3, 1], None, 1),
        ([2, 0, 1, 3], 24, 5),
        ([2, 0, 1, 3], None, 1),
        ([1, 1], 8, 2),
    ],
)
def test_collate_like_the_naive_reference(
    samples: PreparedSamples, indices: list[int], num_text: int | None, num_padding: int
) -> None:
    batch = collate(samples, np.array(indices), num_text)
    inputs, targets = naive_texts(indices, num_padding)
    assert batch.token_ids.tolist() == inputs
    assert batch.targets.tolist() == targets
    assert num_text in (None, len(batch.token_ids))
    assert batch.text_lengths.tolist() == samples.text_lengths[indices].tolist()
    assert batch.token_ids.dtype == batch.targets.dtype == torch.int64
    images = [samples.images[samples.slots.index[i]] for i in indices]
    assert torch.equal(batch.images, torch.stack(images))
    assert batch.images.dtype == torch.uint8


def test_answer_tokens_are_counted_as_collate_labels_them(samples: PreparedSamples) -> None:
    for indices in (np.array([0]), np.array([3, 2]), np.arange(4), np.arange(4)[1::2]):
        labels = collate(samples, indices).targets != -100
        assert samples.num_answer_tokens[indices].sum() == labels.sum()


def test_texts_are_read_without_their_eos(samples: PreparedSamples) -> None:
    assert samples.text_lengths.tolist() == [4, 3, 9, 3]


def test_every_epoch_is_another_permutation() -> None:
    stream = samples_in_order(50, seed=3, start=0, stop=200).reshape(4, 50)
    assert stream.dtype == np.int64
    assert all(sorted(epoch) == list(range(50)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4
    assert (stream[0] != np.arange(50)).any()


def test_the_seed_decides_the_order() -> None:
    first = samples_in_order(50, seed=3, start=0, stop=50)
    assert (first == samples_in_order(50, seed=3, start=0, stop=50)).all()
    assert (first != samples_in_order(50, seed=4, start=0, stop=50)).any()
    # Neither seed + epoch nor the like: no epoch of one seed is an epoch of another.
    later = samples_in_order(50, seed=2, start=50, stop=100)
    assert (first != later).any()


@pytest.mark.parametrize("batch_size", [1, 7, 20, 45])
def test_the_order_is_the_same_for_every_batch_size(batch_size: int) -> None:
    stream = samples_in_order(20, seed=0, start=0, stop=90)
    starts = range(0, 90 - batch_size + 1, batch_size)
    batches = [samples_in_order(20, 0, start, start + batch_size) for start in starts]
    assert (np.concatenate(batches) == stream[: len(starts) * batch_size]).all()


def test_a_batch_does_not_change_the_stream() -> None:
    samples_in_order(20, seed=0, start=0, stop=20)[:] = 0
    assert sorted(samples_in_order(20, seed=0, start=0, stop=20)) == list(range(20))


def test_images_are_put_into_the_buffer_and_are_the_same(samples: PreparedSamples) -> None:
    buffer = image_buffer(samples, 3)
    for indices in (np.array([2, 0]), np.array([1, 1, 2])):
        batch = collate(samples, indices, buffer=buffer)
        assert batch.images.data_ptr() == buffer.data_ptr()
        assert torch.equal(batch.images, collate(samples, indices).images)
