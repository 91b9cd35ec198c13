"""Prepared data as tensors: what training and evaluation read, wherever it came from."""

from dataclasses import dataclass

from torch import Tensor


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
