"""Samples of different lengths in one row of tokens, so that nothing is computed for padding.

The row holds the tokens of all images, then all text tokens, then padding. Whatever treats tokens
one by one (projections, norms, MLPs) works on the row. Attention alone works on the padded view, a
sequence for each sample, in which a token sees those before it in its own sequence and no others;
padding stands at the end of a sequence, where no real token looks. Images stand anywhere in a
sample's text: only positions and the padded view know where.

Shapes: B samples, K images of I tokens each and M text tokens of all samples, padding included,
        N = K * I + M tokens of the row, T tokens of a sequence in the padded view.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each token of a row stands.

    The row ends with at least one token of padding, and the padded view with one sequence of
    padding. Padding of the view shows the row's last token, and padding of the row shows the
    view's last sequence; no loss depends on either, so their gradients are zero and gather is all
    it takes in both directions.
    """

    positions: Tensor
    """int64[N], the position of each token in its sample."""
    pad_index: Tensor
    """int64[(B + 1) * T], the token of the row that each position of the padded view shows."""
    unpad_index: Tensor
    """int64[N], the position in the padded view of each token of the row."""
    last: Tensor
    """int64[B], the last token of each sample."""

    def to(self, device: torch.device) -> "Packing":
        """Return the same on `device`."""
        return Packing(*(tensor.to(device) for tensor in self))


class ImagePlaces(NamedTuple):
    """Where the images of B samples stand, sample by sample; k images in all."""

    counts: Tensor
    """int64[B], images of each sample."""
    places: Tensor
    """int64[k], how many text tokens of the sample stand before the image; never fewer than before
    the sample's image in front of it."""

    @classmethod
    def one_in_front(cls, num_samples: int) -> "ImagePlaces":
        """Return those of samples that each begin with one image."""
        return cls(torch.ones(num_samples, dtype=torch.int64), torch.zeros(num_samples).long())


def pack(
    text_lengths: Tensor,
    num_image_tokens: int,
    num_text: int,
    padded_length: int | None = None,
    images: ImagePlaces | None = None,
    num_images: int | None = None,
) -> Packing:
    """Return the packing of B samples, on the CPU.

    Args:
        text_lengths: int64[B], text tokens of each sample; 0 leaves its images alone.
        num_image_tokens: I
        num_text: M, more than the sum of `text_lengths`.
        padded_length: T, at least the longest sample; None takes that.
        images: None puts one in front of each text.
        num_images: K, at least as many as there are; None takes these.
    """
    images = images or ImagePlaces.one_in_front(len(text_lengths))
    num_real = int(text_lengths.sum())
    assert num_real < num_text, f"no padding among {num_text} tokens for texts of {num_real}"
    lengths = text_lengths + num_image_tokens * images.counts
    longest = int(lengths.max())
    length = padded_length or longest
    assert length >= longest, f"no room in a padded length of {length} for a sample of {longest}"

    image_sample, image_positions = _of_images(images, num_image_tokens)
    sample, text_positions = _of_text(text_lengths, images, num_image_tokens)
    num_of_images = len(images.places) * num_image_tokens
    first_text = num_of_images if num_images is None else num_images * num_image_tokens
    end_text, padding = first_text + num_real, len(lengths) * length
    positions = torch.zeros(first_text + num_text, dtype=torch.int64)
    positions[:num_of_images] = image_positions.flatten()
    positions[first_text:end_text] = text_positions
    sequences = torch.arange(len(lengths)) * length  # (B,) where each begins in the padded view
    unpad_index = torch.full_like(positions, padding)
    unpad_index[:num_of_images] = (image_positions + sequences[image_sample, None]).flatten()
    unpad_index[first_text:end_text] = text_positions + sequences[sample]
    pad_index = torch.full((padding + length,), len(positions) - 1)
    for start, end in ((0, num_of_images), (first_text, end_text)):
        pad_index[unpad_index[start:end]] = torch.arange(start, end)
    return Packing(positions, pad_index, unpad_index, pad_index[sequences + lengths - 1])


def _of_images(images: ImagePlaces, num_image_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the sample of each image, int64[k], and the positions of its tokens, int64[k, I]."""
    sample = torch.arange(len(images.counts)).repeat_interleave(images.counts)
    before = torch.arange(len(sample)) - (images.counts.cumsum(0) - images.counts)[sample]
    starts = images.places + num_image_tokens * before
    return sample, starts[:, None] + torch.arange(num_image_tokens)


def _of_text(
    text_lengths: Tensor, images: ImagePlaces, num_image_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the sample of each real text token, int64[real], and its position, int64[real]."""
    first_image = images.counts.cumsum(0) - images.counts
    sample = torch.arange(len(text_lengths)).repeat_interleave(text_lengths)
    column = torch.arange(len(sample)) - (text_lengths.cumsum(0) - text_lengths)[sample]
    # Samples one after the other, places within them: one ascending key for images and tokens.
    stride = int(text_lengths.max()) + 1
    image_sample = torch.arange(len(text_lengths)).repeat_interleave(images.counts)
    image_keys = image_sample * stride + images.places
    images_before = torch.searchsorted(image_keys, sample * stride + column, right=True)
    return sample, column + num_image_tokens * (images_before - first_image[sample])


def find_images(
    is_text: Tensor, lengths: Tensor, num_image_tokens: int
) -> tuple[Tensor, ImagePlaces]:
    """Return the text tokens of each of B samples, int64[B], and where their images stand.

    Args:
        is_text: bool[all tokens], sample by sample; false for placeholders, I of an image.
        lengths: int64[B], tokens of each sample, placeholders included.

    Raises:
        ValueError: placeholders do not stand together, I of an image.
    """
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    text_lengths = torch.bincount(sample[is_text], minlength=len(lengths))
    num_placeholders = lengths - text_lengths
    counts = num_placeholders // num_image_tokens
    first_text = text_lengths.cumsum(0) - text_lengths
    places = (is_text.cumsum(0) - first_text[sample])[~is_text]  # of each placeholder
    if (counts * num_image_tokens != num_placeholders).any() or (
        places != places[::num_image_tokens].repeat_interleave(num_image_tokens)[: len(places)]
    ).any():
        raise ValueError(f"input_ids must hold {num_image_tokens} placeholders together an image")
    return text_lengths, ImagePlaces(counts, places[::num_image_tokens])


class _Gather(torch.autograd.Function):
    """`x[index]`, for an index that is undone by another: the gradient is gathered as well.

    The gradient of an ordinary index would be summed up token by token, for tokens that occur
    only once.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def pad(x: Tensor, packing: Packing) -> Tensor:
    """Return the padded view of a row: float[N, H, K] -> float[B + 1, H, T, K]"""
    padded = _Gather.apply(x, packing.pad_index, packing.unpad_index)
    return padded.unflatten(0, (len(packing.last) + 1, -1)).transpose(1, 2)


def unpad(padded: Tensor, packing: Packing) -> Tensor:
    """Return the row of a padded view: float[B + 1, H, T, K] -> float[N, H, K]"""
    flat = padded.transpose(1, 2).flatten(0, 1)
    return _Gather.apply(flat, packing.unpad_index, packing.pad_index)
