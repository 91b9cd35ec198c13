"""Training data and benchmark as tensors in memory: decoded and encoded once for all trials."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.data.processors import image_to_uint8
from nanovlm.data.samples import EncodedTurn, encode_prompt, encode_turn, mmstar_prompt
from nanovlm.data.sources import load_benchmark_rows, load_training_rows
from nanovlm.errors import UserError

ROW_ORDER_SEED = 0
"""Rows are shuffled the same way in every run: the cut-off and the validation rows depend on it."""


@dataclass(frozen=True, eq=False)
class PreparedSamples:
    """N samples, each one turn about one of R images.

    Sample i has the tokens `tokens[offsets[i] : offsets[i + 1]]`: prompt, answer, EOS.
    """

    images: Tensor
    """uint8[R, 3, S, S]"""
    image_index: Tensor
    """int64[N], the image of each sample."""
    tokens: Tensor
    """int64[all tokens], one sample behind the other."""
    offsets: Tensor
    """int64[N + 1]"""
    prompt_lengths: Tensor
    """int64[N], tokens of each prompt; the ones behind them are learnt."""
    num_dropped: int
    """Turns that were longer than lm_max_length."""

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def num_answer_tokens(self) -> Tensor:
        """int64[N], tokens of each answer, EOS included."""
        return self.offsets.diff() - self.prompt_lengths


@dataclass(frozen=True, eq=False)
class PreparedBenchmark:
    """N questions; the prompt of question i is `tokens[offsets[i] : offsets[i + 1]]`."""

    images: Tensor
    """uint8[R, 3, S, S]"""
    image_index: Tensor
    """int64[N], the image of each question."""
    tokens: Tensor
    """int64[all tokens], one prompt behind the other."""
    offsets: Tensor
    """int64[N + 1]"""
    answers: tuple[str, ...]
    """The letter of each right option."""
    categories: tuple[str, ...]
    l2_categories: tuple[str, ...]
    indices: tuple[int, ...]
    """The benchmark's own number of each question."""

    def __len__(self) -> int:
        return len(self.answers)

    def prompt(self, item: int) -> Tensor:
        """Return the tokens of one question, int64[T]."""
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]


def prepare_training(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[PreparedSamples, PreparedSamples]:
    """Return the samples for training and for validation.

    The rows of all sub-sets are shuffled, the first `data_cutoff_idx` kept, and the last
    `val_ratio` of these (at least one, unless it is 0) are for validation. Every turn of a row is
    a sample; it sees the row's first image.

    Raises:
        UserError: data or tokenizer do not fit the configuration, or too few samples are left.
    """
    _check_vocabulary(config, tokenizer)
    rows = load_training_rows(config.train_dataset_path, config.train_dataset_name)
    order = np.random.default_rng(ROW_ORDER_SEED).permutation(len(rows))[: config.data_cutoff_idx]
    num_val = max(1, round(len(order) * config.val_ratio)) if config.val_ratio else 0
    num_train = len(order) - num_val
    train = _prepare_rows(rows.select(order[:num_train]), config, tokenizer)
    val = _prepare_rows(rows.select(order[num_train:]), config, tokenizer)
    if not len(train):
        raise UserError(
            f"train_dataset_path={config.train_dataset_path!r}: no training sample is left; of "
            f"{len(order)} rows {num_val} are for validation (val_ratio={config.val_ratio}), and "
            f"{train.num_dropped} turns exceed vlm.lm_max_length={config.vlm.lm_max_length} tokens"
        )
    check_batch_size(config.batch_size, train)
    return train, val


def prepare_benchmark(config: TrainConfig, tokenizer: Tokenizer) -> PreparedBenchmark:
    """Return the benchmark's questions as prompts, in its order.

    Raises:
        UserError: data or tokenizer do not fit the configuration.
    """
    _check_vocabulary(config, tokenizer)
    rows = load_benchmark_rows(config.test_dataset_path)
    prompts = [encode_prompt(tokenizer, mmstar_prompt(question)) for question in rows["question"]]
    tokens, offsets = _join(prompts)
    return PreparedBenchmark(
        images=_images_to_uint8(rows["image"], len(rows), config.vlm.vit_img_size),
        image_index=torch.arange(len(rows)),
        tokens=tokens,
        offsets=offsets,
        answers=tuple(rows["answer"]),
        categories=tuple(rows["category"]),
        l2_categories=tuple(rows["l2_category"]),
        indices=tuple(rows["index"]),
    )


def check_batch_size(batch_size: int, samples: PreparedSamples) -> None:
    """Raise UserError if there are fewer training samples than one optimizer step takes."""
    if batch_size > len(samples):
        raise UserError(
            f"batch_size must be at most the number of training samples, "
            f"got {batch_size} and {len(samples)}"
        )


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    if size > config.vlm.lm_vocab_size:
        raise UserError(
            f"vlm.lm_vocab_size must be at least the number of tokens of "
            f"vlm.lm_tokenizer={config.vlm.lm_tokenizer!r}, "
            f"got {config.vlm.lm_vocab_size} and {size}"
        )


def _prepare_rows(
    rows: datasets.Dataset, config: TrainConfig, tokenizer: Tokenizer
) -> PreparedSamples:
    kept_rows: list[int] = []
    kept_turns: list[EncodedTurn] = []
    image_index: list[int] = []
    num_dropped = 0
    for row, turns in enumerate(rows["texts"]):
        encoded = [_encode(tokenizer, turn, config.vlm) for turn in turns]
        fitting = [turn for turn in encoded if turn is not None]
        num_dropped += len(encoded) - len(fitting)
        if fitting:
            image_index += [len(kept_rows)] * len(fitting)
            kept_rows.append(row)
            kept_turns += fitting
    tokens, offsets = _join([turn.tokens for turn in kept_turns])
    prompt_lengths = [turn.num_prompt_tokens for turn in kept_turns]
    # Rows without a fitting turn are left out first, so that their images are never decoded.
    first_images = map(_first_image, rows.select(kept_rows)["images"])
    return PreparedSamples(
        images=_images_to_uint8(first_images, len(kept_rows), config.vlm.vit_img_size),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int64),
        num_dropped=num_dropped,
    )


def _encode(tokenizer: Tokenizer, turn: dict[str, str], vlm: VLMConfig) -> EncodedTurn | None:
    return encode_turn(
        tokenizer, turn["user"], turn["assistant"], vlm.lm_eos_token_id, vlm.lm_max_length
    )


def _first_image(images: Sequence[Image.Image]) -> Image.Image:
    if not images:
        raise UserError("train_dataset_path: a row has no image")
    return images[0]


def _images_to_uint8(images: Iterable[Image.Image], number: int, size: int) -> Tensor:
    """Return uint8[number, 3, size, size], decoding one image at a time."""
    pixels = torch.empty((number, 3, size, size), dtype=torch.uint8)
    for place, image in zip(pixels, images, strict=True):
        place.copy_(image_to_uint8(image, size))
    return pixels


def _join(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return all tokens one behind the other, and where each sequence starts and the last ends."""
    lengths = [0, *map(len, sequences)]
    tokens = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)
    return tokens, torch.tensor(lengths, dtype=torch.int64).cumsum(0)
