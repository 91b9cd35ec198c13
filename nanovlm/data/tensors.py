"""Prepared data as tensors: what training and evaluation read, wherever it came from."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from nanovlm.config.schema import BenchmarkPart
from nanovlm.errors import UserError


@dataclass(frozen=True, eq=False)
class PreparedSamples:
    """N samples, each one turn about one of R images.

    Sample i has the tokens `tokens[offsets[i] : offsets[i + 1]]`: prompt, answer, EOS. The tensors
    are files mapped into memory: to write to one ends the process.
    """

    images: Tensor
    """uint8[R, 3, S, S]"""
    image_index: Tensor
    """int64[N], the image of each sample."""
    tokens: Tensor
    """int32[all tokens], one sample behind the other."""
    offsets: Tensor
    """int64[N + 1]"""
    prompt_lengths: Tensor
    """int64[N], tokens of each prompt; the ones behind them are learnt."""

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
    """int32[all tokens], one prompt behind the other."""
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
        return self.tokens[self.offsets[item] : self.offsets[item + 1]].long()


SPLIT_NAME = "mmstar_holdout"
"""Goes into the hash of each question; another name would divide otherwise."""


def select_part(
    benchmark: PreparedBenchmark, holdout: float, part: BenchmarkPart
) -> PreparedBenchmark:
    """Return the questions of `part`, in the benchmark's order; images are shared, not copied.

    Args:
        holdout: share of the questions that is kept apart, from 0 to below 1.

    Raises:
        UserError: the part has no question.
    """
    if part == "all" or not holdout:
        return benchmark
    kept_apart = holdout_items(benchmark, Fraction(str(holdout)))
    wanted = part == "holdout"
    items = [item for item in range(len(benchmark)) if (item in kept_apart) == wanted]
    if not items:
        raise UserError(
            f"mmstar_holdout: must leave a question in each part of the benchmark, got {holdout} "
            f"of {len(benchmark)} questions and none for mmstar_part={part!r}"
        )
    return _select(benchmark, items)


def holdout_items(benchmark: PreparedBenchmark, share: Fraction) -> set[int]:
    """Return the places of the questions that are kept apart.

    They are `share` of all, rounded half up, and of each stratum its exact share rounded up or down
    (the method of largest remainders; of equal remainders the first by name is rounded up). A
    stratum is an axis within its capability, so where no axes are told apart it is the capability.
    Within a stratum those come first whose own number has the lowest SHA-256.
    """
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for item, names in enumerate(zip(benchmark.categories, benchmark.l2_categories, strict=True)):
        strata[names].append(item)
    exact = {names: share * len(items) for names, items in strata.items()}
    sizes = {names: int(size) for names, size in exact.items()}
    num_missing = int(share * len(benchmark) + Fraction(1, 2)) - sum(sizes.values())
    by_remainder = sorted(strata, key=lambda names: (sizes[names] - exact[names], names))
    for names in by_remainder[:num_missing]:
        sizes[names] += 1
    return {
        item
        for names, items in strata.items()
        for item in sorted(items, key=lambda i: _rank(benchmark.indices[i]))[: sizes[names]]
    }


def _rank(index: int) -> bytes:
    return hashlib.sha256(f"{SPLIT_NAME} {index}".encode()).digest()


def _select(benchmark: PreparedBenchmark, items: list[int]) -> PreparedBenchmark:
    lengths = benchmark.offsets.diff()[items]
    starts = benchmark.offsets[:-1][items]
    return PreparedBenchmark(
        images=benchmark.images,
        image_index=benchmark.image_index[items],
        tokens=torch.cat(
            [
                benchmark.tokens[start : start + length]
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
        ),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        answers=tuple(benchmark.answers[item] for item in items),
        categories=tuple(benchmark.categories[item] for item in items),
        l2_categories=tuple(benchmark.l2_categories[item] for item in items),
        indices=tuple(benchmark.indices[item] for item in items),
    )
