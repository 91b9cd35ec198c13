"""Rows of samples and their padded view, against loops over tokens and ordinary indexing."""

import pytest
import torch
from torch import Tensor

from nanovlm.models.packing import Packing, pack, pad, unpad

LENGTHS = (3, 0, 5, 1)
NUM_IMAGE_TOKENS = 2
CASES = pytest.mark.parametrize(
    ("num_text", "padded_length"),
    [(10, None), (10, 12), (16, None)],
    ids=["tight", "wide", "long"],
)


def make(num_text: int, padded_length: int | None) -> Packing:
    return pack(torch.tensor(LENGTHS), NUM_IMAGE_TOKENS, num_text, padded_length)


def naive_tokens() -> list[list[int]]:
    """Return the tokens of each sample in the row, in their order."""
    num_images, text = len(LENGTHS) * NUM_IMAGE_TOKENS, iter(range(1000))
    return [
        [sample * NUM_IMAGE_TOKENS + i for i in range(NUM_IMAGE_TOKENS)]
        + [num_images + next(text) for _ in range(length)]
        for sample, length in enumerate(LENGTHS)
    ]


@CASES
def test_where_each_token_stands(num_text: int, padded_length: int | None) -> None:
    packing = make(num_text, padded_length)
    num_row = len(LENGTHS) * NUM_IMAGE_TOKENS + num_text
    view = packing.pad_index.view(len(LENGTHS) + 1, -1).tolist()
    assert len(view[0]) == (padded_length or NUM_IMAGE_TOKENS + max(LENGTHS))
    assert len(packing.positions) == len(packing.unpad_index) == num_row
    is_padding = set(range(num_row))
    for sample, tokens in enumerate(naive_tokens()):
        assert view[sample] == tokens + [num_row - 1] * (len(view[0]) - len(tokens))
        assert packing.positions[tokens].tolist() == list(range(len(tokens)))
        assert packing.last[sample] == tokens[-1]
        is_padding -= set(tokens)
    assert num_row - 1 in is_padding
    assert set(view[-1]) == {num_row - 1}
    padding = len(LENGTHS) * len(view[0])
    assert (packing.unpad_index[list(is_padding)] >= padding).all()


@CASES
def test_gradients_equal_those_of_indexing(num_text: int, padded_length: int | None) -> None:
    """With a loss that reads real tokens alone, as all ours do."""
    packing = make(num_text, padded_length)
    real = torch.tensor([token for tokens in naive_tokens() for token in tokens])
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(len(packing.positions), 2, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(real), 2, 3, generator=generator, dtype=torch.float64)

    def indexed_pad(x: Tensor, packing: Packing) -> Tensor:
        return x[packing.pad_index].view(len(LENGTHS) + 1, -1, 2, 3).transpose(1, 2)

    def indexed_unpad(padded: Tensor, packing: Packing) -> Tensor:
        return padded.transpose(1, 2).reshape(-1, 2, 3)[packing.unpad_index]

    results = []
    for pad_with, unpad_with in ((pad, unpad), (indexed_pad, indexed_unpad)):
        x = row.clone().requires_grad_()
        # What attention does, as far as it matters here: a token sees those before it.
        y = unpad_with(pad_with(x, packing).cumsum(2) ** 2, packing)[real]
        (y * weights).sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    (y, gradient), (expected_y, expected_gradient) = results
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(gradient, expected_gradient)
    assert expected_gradient[real].abs().min() > 0


@pytest.mark.parametrize(
    ("num_text", "padded_length", "message"), [(9, None, "no padding"), (10, 6, "room")]
)
def test_no_room(num_text: int, padded_length: int | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        make(num_text, padded_length)
