"""What the benchmarks share: models of three sizes, and texts with the lengths of real ones.

`222m` is nanoVLM-222M. In `tiny` and `small`, for the CPU, the vision encoder, the decoder and its
head have about the shares of the work that they have there: half, two fifths, a tenth.

The lengths are made up, after what is known of the_cauldron (several turns an image, all of them
used): short questions with answers of a few tokens are most of it, then multiple choice and
captions, and 40 % of the texts exceed nanoVLM v0.1's 79 tokens, up to whole web pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.config.schema import VLMConfig
from nanovlm.data.samples import ImageSlots, PreparedSamples

EOS = 0

CPU_MODEL: dict[str, Any] = {"lm_re_base": 10_000, "vlm_load_backbone_weights": False}

VLM_CONFIGS = {
    "tiny": VLMConfig(
        vit_hidden_dim=128,
        vit_n_heads=2,
        vit_n_blocks=4,
        lm_hidden_dim=128,
        lm_inter_dim=344,
        lm_vocab_size=3072,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=6,
        **CPU_MODEL,
    ),
    "small": VLMConfig(
        vit_hidden_dim=256,
        vit_n_heads=4,
        vit_n_blocks=6,
        lm_hidden_dim=256,
        lm_inter_dim=680,
        lm_vocab_size=8192,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=8,
        **CPU_MODEL,
    ),
    "222m": VLMConfig(vlm_load_backbone_weights=False),
}

TEXT_LENGTHS = (
    (13, 2), (15, 2), (17, 3), (21, 3), (24, 3), (28, 2), (31, 4),  # short questions
    (48, 5), (62, 5),  # multiple choice
    (19, 9), (14, 15), (13, 52),  # captions
    (88, 4), (130, 5), (25, 70), (20, 110), (33, 140), (15, 220), (60, 320), (15, 900),  # too long
)  # fmt: skip
"""Tokens of prompt and answer, EOS included, each for 5 % of the samples; 60 % fit into 79. Those
have 34 tokens on average, 9 of them learnt."""


@dataclass(frozen=True, eq=False)
class Texts:
    """N samples as a training set has them before anyone looks at their lengths."""

    tokens: Sequence[Tensor]
    """int64[length] each: prompt, answer, EOS."""
    prompt_lengths: Sequence[int]
    images: Tensor
    """uint8[R, 3, S, S]; sample i is about image i % R."""

    def __len__(self) -> int:
        return len(self.tokens)

    def fitting(self, max_length: int) -> "Texts":
        """Return the samples of at most `max_length` tokens: what this project prepares."""
        kept = [i for i, tokens in enumerate(self.tokens) if len(tokens) <= max_length]
        return Texts(
            [self.tokens[i] for i in kept], [self.prompt_lengths[i] for i in kept], self.images
        )

    def prepared(self) -> PreparedSamples:
        """Return the samples in the form in which this project trains on them."""
        return PreparedSamples(
            images=self.images,
            slots=ImageSlots.one_each(torch.arange(len(self)) % len(self.images)),
            tokens=torch.cat(list(self.tokens)).int(),
            offsets=offsets_of(self.tokens),
            prompt_lengths=torch.tensor(self.prompt_lengths),
        )


def make_texts(config: VLMConfig, num_samples: int, num_images: int, seed: int = 0) -> Texts:
    """Return samples of random tokens and pixels, their lengths in the order of the table."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [TEXT_LENGTHS[i % len(TEXT_LENGTHS)] for i in range(num_samples)]
    tokens = [
        F.pad(random_tokens(prompt + answer - 1, config, generator), (0, 1), value=EOS)
        for prompt, answer in lengths
    ]
    return Texts(
        tokens, [prompt for prompt, _ in lengths], random_images(config, num_images, generator)
    )


def random_tokens(length: int, config: VLMConfig, generator: torch.Generator) -> Tensor:
    """Return int64[length] without EOS."""
    return torch.randint(1, config.lm_vocab_size, (length,), generator=generator)


def random_images(config: VLMConfig, num_images: int, generator: torch.Generator) -> Tensor:
    """Return noise, uint8[R, 3, S, S]."""
    shape = (num_images, 3, config.vit_img_size, config.vit_img_size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def offsets_of(parts: Sequence[Tensor]) -> Tensor:
    """Return where each part begins when they lie behind each other, and the end: int64[N + 1]"""
    return F.pad(torch.tensor([len(part) for part in parts]).cumsum(0), (1, 0))


def question_lengths(num_questions: int) -> list[int]:
    """Return tokens of the prompts of a benchmark like MMStar, in a fixed order.

    Question and options have 165 characters on average and 1,800 at most; v0.1's template adds 14
    tokens. So: 14 + exp(normal of mean 3.5 and deviation 0.75), its quantiles; 1,500 questions
    have 58 tokens on average and 440 at most.
    """
    normal = NormalDist(3.5, 0.75)
    quantiles = [normal.inv_cdf((i + 0.5) / num_questions) for i in range(num_questions)]
    lengths = [14 + round(math.exp(quantile)) for quantile in quantiles]
    order = torch.randperm(num_questions, generator=torch.Generator().manual_seed(1))
    return [lengths[i] for i in order.tolist()]
