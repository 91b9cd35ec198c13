"""Made-up questions with MMStar's lengths, and a model that has learnt to answer them briefly.

The last token of a prompt is one of four words, each of which stands for a letter: easy to learn,
and so the letters are told apart clearly.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from benchmarks.setups import EOS, offsets_of, question_lengths, random_images
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.samples import ImageSlots, PreparedSamples
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train

LETTERS = "ABCD"
LAST_WORDS = ("first", "second", "third", "fourth")
WORDS = ("<eos>", *LETTERS, *LAST_WORDS, "The", "answer", "is")
"""Words with a meaning, by their token; all others have none."""
LESSON_LENGTHS = range(17, 57)
LESSON_BATCH = 16
MAX_LESSONS = 600
LESSONS_BETWEEN_EXAMS = 20
MAX_IMAGES = 512


def make_tokenizer(config: VLMConfig) -> Tokenizer:
    """Return a tokenizer of whole words with the model's vocabulary; EOS is 0."""
    words = [*WORDS, *(f"w{i}" for i in range(config.lm_vocab_size - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def make_benchmark(config: VLMConfig, num_questions: int) -> PreparedBenchmark:
    """Return questions of random words; the right letter is the last word's for three of four."""
    generator = torch.Generator().manual_seed(2)
    lengths = question_lengths(num_questions)
    prompts = [make_prompt(length, i % 4, config, generator) for i, length in enumerate(lengths)]
    num_images = min(num_questions, MAX_IMAGES)
    return PreparedBenchmark(
        images=random_images(config, num_images, generator),
        slots=ImageSlots.one_each(torch.arange(num_questions) % num_images),
        tokens=torch.cat(prompts).int(),
        offsets=offsets_of(prompts),
        answers=tuple(LETTERS[i % 4 if i % 3 else 0] for i in range(num_questions)),
        categories=("all",) * num_questions,
        l2_categories=("all",) * num_questions,
        indices=tuple(range(num_questions)),
    )


def make_prompt(length: int, letter: int, config: VLMConfig, generator: torch.Generator) -> Tensor:
    """Return random words and the last word of the letter, int64[length]."""
    words = torch.randint(len(WORDS), config.lm_vocab_size, (length,), generator=generator)
    words[-1] = WORDS.index(LAST_WORDS[letter])
    return words


def stopping_model(model: VisionLanguageModel, tokenizer: Tokenizer, device: torch.device) -> None:
    """Train `model` until it answers all questions of an exam with their letter and EOS."""
    config = TrainConfig(
        lr_mp=1e-3,
        lr_backbones=1e-3,
        batch_size=LESSON_BATCH,
        epochs=MAX_LESSONS * LESSON_BATCH // len(LESSON_LENGTHS),
        lr_schedule="constant",
        vlm=model.config,
    )
    exam = make_benchmark(model.config, 32)
    step_size = LESSONS_BETWEEN_EXAMS * LESSON_BATCH
    milestones = range(step_size, MAX_LESSONS * LESSON_BATCH + 1, step_size)
    lessons = make_lessons(model.config)
    for _ in train(model, lessons, config, milestones, device=device):
        outputs = evaluate_mmstar(model, exam, tokenizer, LESSON_BATCH, device).outputs
        if all(output == LETTERS[i % 4] for i, output in enumerate(outputs)):
            return
    raise AssertionError(f"has not learnt to answer and stop: {outputs}")


def make_lessons(config: VLMConfig) -> PreparedSamples:
    """Return questions with their answers: the letter and EOS."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        make_prompt(length, i % 4, config, generator) for i, length in enumerate(LESSON_LENGTHS)
    ]
    texts = [
        torch.cat((prompt, torch.tensor([WORDS.index(LETTERS[i % 4]), EOS])))
        for i, prompt in enumerate(prompts)
    ]
    return PreparedSamples(
        images=random_images(config, len(texts), generator),
        slots=ImageSlots.one_each(torch.arange(len(texts))),
        tokens=torch.cat(texts).int(),
        offsets=offsets_of(texts),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
    )
