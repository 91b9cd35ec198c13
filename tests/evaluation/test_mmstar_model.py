"""Asking a model: which question goes with which image and answer, and what must not matter."""

import dataclasses
import math
import weakref
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.config.generations import PUBLISHED_IMAGES
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.digits import digits_tokenizer
from nanovlm.data.samples import ImageSlots
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.evaluation.mmstar_result import MMStarResult
from nanovlm.models.language_model import KVCache
from nanovlm.models.packing import Packing
from nanovlm.models.vision_language_model import Prefill, VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.devices import CPU, CUDA, on_each_device, use_bfloat16
from tests.tiny import vlm_config

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
        slots=ImageSlots.one_each(torch.arange(len(images))),
        tokens=torch.cat([torch.tensor(prompt) for prompt in prompts]),
        offsets=F.pad(torch.tensor([len(p) for p in prompts]).cumsum(0), (1, 0)),
        answers=tuple(answers),
        categories=tuple(f"category {i % 2}" for i in range(len(prompts))),
        l2_categories=tuple(f"axis {i % 4}" for i in range(len(prompts))),
        indices=tuple(range(len(prompts))),
    )


def random_benchmark(order: list[int], num_questions: int = 12) -> PreparedBenchmark:
    """Questions of 3 to 6 tokens: those of a dozen, or more, in the given order."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_questions, 3, 8, 8), generator=generator, dtype=torch.uint8)
    prompts = [
        torch.randint(2, VLM.lm_vocab_size, (3 + i % 4,), generator=generator).tolist()
        for i in range(num_questions)
    ]
    answers = ("ABCD" * len(order))[: len(order)]
    return benchmark_of([prompts[i] for i in order], images[order], answers)


def evaluate(
    model: Any,
    benchmark: PreparedBenchmark,
    batch_size: int | Literal["auto"] = 5,
    device: torch.device = CPU,
) -> MMStarResult:
    return evaluate_mmstar(
        cast(VisionLanguageModel, model), benchmark, TOKENIZER, batch_size, device
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
def test_a_gpu_gives_the_answers_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where both compute the same."""
    model, benchmark = VisionLanguageModel(VLM), random_benchmark([*range(12)])
    expected = evaluate(model, benchmark)
    use_bfloat16(monkeypatch, False)
    for batch_size in (1, 12):
        result = evaluate(model.to(CUDA), benchmark, batch_size, CUDA)
        assert result.letter_nlls == pytest.approx(expected.letter_nlls, abs=1e-3)
        assert dataclasses.replace(result, letter_nlls=expected.letter_nlls) == expected


def clearest_questions(model: VisionLanguageModel, least_lead: float) -> PreparedBenchmark:
    """Return twelve questions at which no choice is close, of a token or of a letter.

    Each choice leads the second best one by `least_lead` or more, in logits.
    """
    letters = [TOKENIZER.token_to_id(letter) for letter in "ABCD"]
    chosen_from: list[Tensor] = []
    hook = model.decoder.head.register_forward_hook(lambda *call: chosen_from.append(call[2]))
    leads = []
    for question in range(64):
        chosen_from.clear()
        evaluate(model, random_benchmark([question], 64))
        best = [logits[0].topk(2).values for logits in chosen_from]
        best.append(chosen_from[0][0, letters].topk(2).values)
        leads.append(min((first - second).item() for first, second in best))
    hook.remove()
    clearest = sorted(range(64), key=leads.__getitem__)[-12:]
    assert leads[clearest[0]] > least_lead
    return random_benchmark(clearest, 64)


@on_each_device
def test_the_batch_size_does_not_matter_in_bfloat16(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question has one answer alone and in a packed row; its letters weigh the same to 0.05.

    That answer is the one in float32, with letters that weigh the same to 0.1. Products of other
    shapes round otherwise, which would turn a close choice, so these are left out.
    """
    model = VisionLanguageModel(VLM)
    benchmark = clearest_questions(model, least_lead=0.2)
    precise = evaluate(model, benchmark)
    use_bfloat16(monkeypatch, True)
    alone, *packed = (evaluate(model.to(device), benchmark, n, device) for n in (1, 5, 12))
    assert alone.letter_nlls != precise.letter_nlls
    assert alone.letter_nlls == pytest.approx(precise.letter_nlls, abs=0.1)
    assert dataclasses.replace(alone, letter_nlls=precise.letter_nlls) == precise
    for result in packed:
        assert result.letter_nlls == pytest.approx(alone.letter_nlls, abs=0.05)
        assert dataclasses.replace(result, letter_nlls=alone.letter_nlls) == alone


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


class SmallMemory(VisionLanguageModel):
    """Runs out of memory when asked more than `most` questions at a time."""

    most = 3

    def prefill(
        self, token_ids: Tensor, image: Tensor, packing: Packing, max_new_tokens: int = 5
    ) -> Prefill:
        self.asked.append(len(image))
        self.alive.append(sum(reference() is not None for reference in self.references))
        self.references.append(weakref.ref(image))
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().prefill(token_ids, image, packing, max_new_tokens)

    def forget(self) -> None:
        self.asked: list[int] = []
        self.alive: list[int] = []
        self.references: list[weakref.ref[Tensor]] = []


def test_fewer_questions_at_a_time_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every question is asked once, in the same order, and what failed is gone from memory."""
    monkeypatch.setattr("nanovlm.evaluation.mmstar.AUTO_BATCH", {"cpu": 8})
    benchmark = random_benchmark(list(range(12)))
    model = SmallMemory(VLM, seed=4)
    model.forget()
    result = evaluate(model, benchmark, "auto")
    assert model.asked == [8, 4, 2, 2, 2, 2, 2, 2]
    assert model.alive[1:3] == [0, 0]
    assert [r.getMessage() for r in caplog.records if "at a time" in r.getMessage()] == [
        "8 questions at a time: CUDA out of memory.",
        "4 questions at a time: CUDA out of memory.",
    ]
    expected = evaluate(VisionLanguageModel(VLM, seed=4), benchmark, 2)
    assert result.outputs == expected.outputs and result.letter_nlls == expected.letter_nlls


@pytest.mark.parametrize(
    ("batch_size", "most", "asked"), [(4, 3, [4]), ("auto", 0, [12, 6, 3, 2, 1])]
)
def test_what_does_not_fit_at_all_is_an_error(
    batch_size: int | Literal["auto"], most: int, asked: list[int]
) -> None:
    model = SmallMemory(VLM)
    model.forget()
    model.most = most
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, random_benchmark(list(range(12))), batch_size)
    assert model.asked == asked
