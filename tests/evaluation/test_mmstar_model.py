"""Asking a model: which question goes with which image and answer, and what must not matter."""

import dataclasses
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.data.digits import digits_tokenizer
from nanovlm.data.tensors import PreparedBenchmark
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.evaluation.mmstar_result import MMStarResult
from nanovlm.models.checkpoint import PUBLISHED_IMAGES
from nanovlm.models.language_model import KVCache
from nanovlm.models.packing import Packing
from nanovlm.models.vision_language_model import Prefill, VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.tiny import vlm_config

CPU = torch.device("cpu")
TOKENIZER = digits_tokenizer()
A, B = (TOKENIZER.encode(letter).ids[0] for letter in "AB")
EOS = 0
VLM = vlm_config(
    vit_patch_size=4,
    vit_img_size=8,
    lm_vocab_size=TOKENIZER.get_vocab_size(),
    **PUBLISHED_IMAGES,
)


def benchmark_of(prompts: list[list[int]], images: Tensor, answers: str) -> PreparedBenchmark:
    return PreparedBenchmark(
        images=images,
        image_index=torch.arange(len(images)),
        tokens=torch.cat([torch.tensor(prompt) for prompt in prompts]),
        offsets=F.pad(torch.tensor([len(p) for p in prompts]).cumsum(0), (1, 0)),
        answers=tuple(answers),
        categories=tuple(f"category {i % 2}" for i in range(len(prompts))),
        l2_categories=tuple(f"axis {i % 4}" for i in range(len(prompts))),
        indices=tuple(range(len(prompts))),
    )


def random_benchmark(order: list[int]) -> PreparedBenchmark:
    """Twelve questions of 3 to 6 tokens in the given order."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    prompts = [
        torch.randint(2, VLM.lm_vocab_size, (3 + i % 4,), generator=generator).tolist()
        for i in range(12)
    ]
    return benchmark_of([prompts[i] for i in order], images[order], "ABCD" * 3)


def evaluate(model: Any, benchmark: PreparedBenchmark, batch_size: int = 5) -> MMStarResult:
    return evaluate_mmstar(
        cast(VisionLanguageModel, model), benchmark, TOKENIZER, batch_size, device=CPU
    )


class Echo(nn.Module):
    """Answers as the table says for (first token of the prompt, image): with logits of the letters
    A and B, and with tokens, which need not agree."""

    config = VLM

    def __init__(self, table: dict[tuple[int, int], tuple[list[float], list[int]]]) -> None:
        super().__init__()
        self.table = table

    def prefill(
        self, token_ids: Tensor, image: Tensor, packing: Packing, max_new_tokens: int
    ) -> Prefill:
        assert not self.training and not torch.is_grad_enabled()
        assert max_new_tokens == 5
        pixels = (image[:, 0, 0, 0] * 255).round().int().tolist()
        text = token_ids[packing.positions[-len(token_ids) :] == VLM.num_image_tokens]
        asked = zip(text.tolist(), pixels, strict=True)
        answers = [self.table[question] for question in asked]
        logits = torch.full((len(answers), VLM.lm_vocab_size), 9.0)  # no letter is the likeliest
        logits[:, [A, B]] = torch.tensor([logits_of_letters for logits_of_letters, _ in answers])
        self.tokens = torch.tensor([tokens for _, tokens in answers])
        return Prefill(logits, KVCache(packing.last, 0))

    def complete(self, prefill: Prefill, max_new_tokens: int) -> Tensor:
        assert max_new_tokens == 5
        return self.tokens


def test_questions_images_and_answers_stay_together() -> None:
    """Lengths 2, 1, 2, 1, so that the batches mix the order of the questions."""
    prompts = [[10, 11], [12], [13, 11], [14]]
    images = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    model = Echo(
        {
            (10, 1): ([0.0, math.log(3)], [A, EOS, EOS]),
            (12, 2): ([5.0, 5.0], [B, A, EOS]),
            (13, 3): ([0.0, 1000.0], [A, EOS, B]),  # what follows EOS is not part of the answer
            (14, 4): ([math.log(4), 0.0], [EOS, EOS, EOS]),
        }
    )
    for batch_size in (1, 2, 8):
        result = evaluate(model, benchmark_of(prompts, images, "ABBA"), batch_size)
        assert result.indices == (0, 1, 2, 3)
        assert result.answers == ("A", "B", "B", "A")
        assert result.outputs == ("A", "B A", "A", "")
        assert result.correct == (True, True, False, False)
        assert result.letters == ("B", "A", "B", "A")  # of equal ones the first
        nlls = (-math.log(1 / 4), -math.log(1 / 2), 0.0, -math.log(4 / 5))
        assert result.letter_nlls == pytest.approx(nlls, abs=1e-6)
        assert result.categories == ("category 0", "category 1", "category 0", "category 1")


def test_the_letters_come_from_the_pass_that_starts_the_answer() -> None:
    """Against the logits at the last token of the prompt; the encoder sees each image once."""
    model, benchmark = VisionLanguageModel(VLM, seed=3).eval(), random_benchmark([*range(12)])
    seen: list[int] = []
    model.vision_encoder.register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    result = evaluate(model, benchmark)
    assert sum(seen) == 12
    letters = torch.tensor([TOKENIZER.token_to_id(letter) for letter in "ABCD"])
    for item in range(12):
        image = image_input(benchmark.images[item][None], VLM)
        with torch.no_grad():
            logits, _ = model(benchmark.prompt(item)[None], image)
        log_probabilities = logits[0, -1, letters].log_softmax(dim=0)
        place = "ABCD".index(benchmark.answers[item])
        nll = -log_probabilities[place].item()
        assert result.letter_nlls[item] == pytest.approx(nll, abs=1e-5)
        assert result.letters[item] == "ABCD"[int(log_probabilities.argmax())]
    assert len(set(result.letters)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 12])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model, benchmark = VisionLanguageModel(VLM), random_benchmark([*range(12)])
    expected = evaluate(model, benchmark)
    assert len(set(expected.outputs)) > 4  # they do differ
    result = evaluate(model, benchmark, batch_size)
    assert result.letter_nlls == pytest.approx(expected.letter_nlls, abs=1e-5)
    assert dataclasses.replace(result, letter_nlls=expected.letter_nlls) == expected


def test_the_order_of_the_questions_does_not_matter() -> None:
    model, order = VisionLanguageModel(VLM), [7, 2, 11, 0, 5, 9, 1, 10, 4, 8, 3, 6]
    expected = evaluate(model, random_benchmark([*range(12)])).outputs
    assert evaluate(model, random_benchmark(order)).outputs == tuple(expected[i] for i in order)


@pytest.mark.gpu
def test_a_gpu_gives_the_answers_of_a_cpu() -> None:
    model, benchmark = VisionLanguageModel(VLM), random_benchmark([*range(12)])
    expected = evaluate(model, benchmark)
    cuda = torch.device("cuda")
    for batch_size in (1, 12):
        result = evaluate_mmstar(model.to(cuda), benchmark, TOKENIZER, batch_size, cuda)
        assert result.letter_nlls == pytest.approx(expected.letter_nlls, abs=1e-3)
        assert dataclasses.replace(result, letter_nlls=expected.letter_nlls) == expected


def test_training_is_not_disturbed() -> None:
    model = VisionLanguageModel(dataclasses.replace(VLM, lm_dropout=0.5)).train()
    state = torch.random.get_rng_state()
    first, second = (evaluate(model, random_benchmark([*range(12)])) for _ in range(2))
    assert first == second  # no dropout takes part
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    evaluate(model.eval(), random_benchmark([*range(12)]))
    assert not model.training
