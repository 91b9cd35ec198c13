"""What a model answered to each question, which answers are right, and the numbers that follow."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from nanovlm.config.schema import MMStarRules
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.evaluation.mmstar_rules import NEWEST_RULES, is_correct, rules_letters


class ItemAnswer(NamedTuple):
    """What a model answers to one question."""

    output: str
    """Its answer in words, up to EOS."""
    letter: str
    """The letter that is the likeliest of all letters to come first."""
    letter_nll: float
    """-log of the right letter's probability, of all letters to come first; natural logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MMStarResult:
    """What the model answered to each item, in the order of the benchmark, and what is right."""

    indices: tuple[int, ...]
    """The benchmark's own number of each question."""
    answers: tuple[str, ...]
    """The right letters."""
    outputs: tuple[str, ...]
    correct: tuple[bool, ...]
    """Whether the output names the right letter."""
    letters: tuple[str, ...]
    letter_nlls: tuple[float, ...]
    categories: tuple[str, ...]
    """MMStar's capabilities."""
    l2_categories: tuple[str, ...]
    """MMStar's axes: the finer division of the capabilities."""

    @classmethod
    def of(
        cls,
        benchmark: PreparedBenchmark,
        answered: Sequence[ItemAnswer],
        rules: MMStarRules = NEWEST_RULES,
    ) -> Self:
        """Score the answers to all questions of `benchmark`, in its order."""
        outputs, letters, letter_nlls = zip(*answered, strict=True)
        looked_for = rules_letters(max(benchmark.answers))
        pairs = zip(outputs, benchmark.answers, strict=True)
        return cls(
            indices=benchmark.indices,
            answers=benchmark.answers,
            outputs=outputs,
            correct=tuple(is_correct(*pair, rules, looked_for) for pair in pairs),
            letters=letters,
            letter_nlls=letter_nlls,
            categories=benchmark.categories,
            l2_categories=benchmark.l2_categories,
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers (micro average)."""
        return sum(self.correct) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Standard error of `accuracy`, from the items being a sample of all such questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))

    @property
    def letter_accuracy(self) -> float:
        """Share of questions whose likeliest letter is the right one."""
        right = [
            letter == answer for letter, answer in zip(self.letters, self.answers, strict=True)
        ]
        return sum(right) / len(right)

    @property
    def letter_nll(self) -> float:
        """Mean of -log p(right letter); log(4) = 1.386 if four letters are all alike."""
        return math.fsum(self.letter_nlls) / len(self.letter_nlls)

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
            "mmstar_letter_accuracy": self.letter_accuracy,
            "mmstar_letter_nll": self.letter_nll,
        } | {f"mmstar_accuracy/{name}": accuracy for name, accuracy in sorted(parts.items())}

    def json_lines(self) -> str:
        """Return one line of JSON for each question, in the order of the benchmark."""
        columns = {
            "index": self.indices,
            "answer": self.answers,
            "output": self.outputs,
            "correct": self.correct,
            "letter": self.letters,
            "letter_nll": self.letter_nlls,
        }
        items = zip(*columns.values(), strict=True)
        return "".join(f"{json.dumps(dict(zip(columns, i, strict=True)))}\n" for i in items)


def _accuracy_by(names: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for name, right in zip(names, correct, strict=True):
        groups[name].append(right)
    return {name: sum(groups[name]) / len(groups[name]) for name in sorted(groups)}
