"""Accuracy on multiple-choice questions in MMStar's format, the same number at every call.

The model answers greedily, its answer ends at the first EOS, and lmms-eval's rules for MMStar
decide whether it names the right letter. Questions are batched by the exact length of their
prompts, so there is no padding and no answer depends on the questions beside it.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from nanovlm.data.prepared import PreparedBenchmark
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import gather_objects, rank, world_size
from nanovlm.training.forward import evaluating, image_input, mixed_precision

MAX_NEW_TOKENS = 5
"""Enough for the longest wording that counts, `The answer is A`."""

ANSWER_OPENINGS = ("", "(", "option ", "the answer is ")
"""What may precede the letter, by lmms-eval's rules for MMStar."""


def is_correct(output: str, letter: str) -> bool:
    """Return whether `output` answers with `letter`, by lmms-eval's rules for MMStar.

    Case, outer white space and line breaks do not matter. The letter has to come first, or right
    after one of the openings; what follows it is not read, so `A cat` counts as A.
    """
    text = output.lower().strip().replace("\n", " ")
    return any(text.startswith(opening + letter.lower()) for opening in ANSWER_OPENINGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class MMStarResult:
    """What the model answered to each item, in the order of the benchmark, and what is right."""

    outputs: tuple[str, ...]
    correct: tuple[bool, ...]
    categories: tuple[str, ...]
    """MMStar's capabilities."""
    l2_categories: tuple[str, ...]
    """MMStar's axes: the finer division of the capabilities."""

    @property
    def accuracy(self) -> float:
        """Share of right answers (micro average)."""
        return sum(self.correct) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Standard error of `accuracy`, from the items being a sample of all such questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))

    @property
    def category_accuracy(self) -> dict[str, float]:
        """Share of right answers of each capability."""
        return _accuracy_by(self.categories, self.correct)

    @property
    def axis_accuracy(self) -> dict[str, float]:
        """Share of right answers of each axis, by `capability/axis`."""
        pairs = zip(self.categories, self.l2_categories, strict=True)
        return _accuracy_by(["/".join(pair) for pair in pairs], self.correct)

    @property
    def macro_accuracy(self) -> float:
        """Mean of the axes' accuracies: what lmms-eval reports as the average."""
        return sum(self.axis_accuracy.values()) / len(self.axis_accuracy)

    def metrics(self) -> dict[str, float]:
        """Return the numbers by the names under which they are reported."""
        parts = self.category_accuracy | self.axis_accuracy
        return {
            "mmstar_accuracy": self.accuracy,
            "mmstar_standard_error": self.standard_error,
            "mmstar_num_items": float(len(self.correct)),
            "mmstar_macro_accuracy": self.macro_accuracy,
        } | {f"mmstar_accuracy/{name}": accuracy for name, accuracy in sorted(parts.items())}


def _accuracy_by(names: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for name, right in zip(names, correct, strict=True):
        groups[name].append(right)
    return {name: sum(groups[name]) / len(groups[name]) for name in sorted(groups)}


def evaluate_mmstar(
    model: VisionLanguageModel,
    benchmark: PreparedBenchmark,
    tokenizer: Tokenizer,
    batch_size: int,
    device: torch.device,
) -> MMStarResult:
    """Ask `model` all questions; the workers share them, and each returns the whole result."""
    batches = equal_length_batches(benchmark.offsets.diff().tolist(), batch_size)
    answered: dict[int, str] = {}
    with evaluating(model):
        for items in batches[rank() :: world_size()]:
            answered |= zip(items, _answer(model, benchmark, tokenizer, items, device), strict=True)
    answered = {item: text for part in gather_objects(answered) for item, text in part.items()}
    outputs = tuple(answered[item] for item in range(len(benchmark)))
    return MMStarResult(
        outputs=outputs,
        correct=tuple(map(is_correct, outputs, benchmark.answers)),
        categories=benchmark.categories,
        l2_categories=benchmark.l2_categories,
    )


def equal_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the items in batches of at most `batch_size` whose `lengths` are all the same."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for item, length in enumerate(lengths):
        by_length[length].append(item)
    return [
        items[start : start + batch_size]
        for _, items in sorted(by_length.items())
        for start in range(0, len(items), batch_size)
    ]


def _answer(
    model: VisionLanguageModel,
    benchmark: PreparedBenchmark,
    tokenizer: Tokenizer,
    items: list[int],
    device: torch.device,
) -> list[str]:
    """Return the answers to `items`, whose prompts have one length."""
    prompts = torch.stack([benchmark.prompt(item) for item in items]).to(device)
    pixels = benchmark.images[benchmark.image_index[items]]
    images = image_input(pixels, model.config, device)
    with mixed_precision(device):
        outputs = model.generate(prompts, images, max_new_tokens=MAX_NEW_TOKENS, greedy=True)
    eos = model.config.lm_eos_token_id
    answers = [row[: row.index(eos)] if eos in row else row for row in outputs.tolist()]
    return tokenizer.decode_batch(answers)
