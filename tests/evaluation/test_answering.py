"""A saved model answers the questions of another program as it answers those of this one."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nanovlm.data.digits import digits_benchmark_rows, digits_tokenizer
from nanovlm.errors import UserError
from nanovlm.evaluation.answering import Decoding, SavedModel, take_images
from nanovlm.evaluation.mmstar import evaluate_mmstar, num_new_tokens
from nanovlm.evaluation.questions import Question, QuestionReader
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.training.forward import image_input
from tests.devices import CPU
from tests.tiny import VLM, digits_config, vlm_config

TOKENIZER = digits_tokenizer()
SHORT = Decoding(max_new_tokens=num_new_tokens(TOKENIZER, "ABCD"))


def saved_model(seed: int = 1, **options: Any) -> SavedModel:
    return SavedModel(VisionLanguageModel(VLM, seed=seed).eval(), TOKENIZER, **options)


def opened(*images: Image.Image) -> Callable[[], list[Image.Image]]:
    return lambda: [*images]


def prompt_of(question: Question, **options: Any) -> list[int]:
    (prompt,) = QuestionReader(VLM, TOKENIZER, **options).read([question])
    return prompt.text


@cache
def digit_questions() -> list[Question]:
    rows = digits_benchmark_rows()
    return [Question(row["question"], opened(row["image"]), f"row {row['index']}") for row in rows]


def some(number: int = 12) -> list[Question]:
    """Questions of different kinds, so of different lengths."""
    questions = digit_questions()
    return questions[:: len(questions) // number][:number]


def test_answers_are_those_of_the_projects_own_evaluation() -> None:
    saved = saved_model(prompt="mmstar", batch_size=32)
    benchmark = Resources(CPU).benchmark(digits_config())
    expected = evaluate_mmstar(saved.model, benchmark, TOKENIZER, 32, CPU)
    answers = saved.answers(digit_questions(), SHORT)
    assert answers == [output.strip() for output in expected.outputs]
    assert len(set(answers)) > 3


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_answers_depend_neither_on_the_batch_nor_on_the_order(batch_size: Any) -> None:
    questions = some()
    answers = saved_model(batch_size=12).answers(questions, SHORT)
    assert len(set(answers)) > 1
    reverse = saved_model(batch_size=batch_size).answers(questions[::-1], SHORT)
    assert reverse[::-1] == answers


def test_the_prompt_is_that_of_training_unless_told_otherwise() -> None:
    question = some()[0]
    alike = question._replace(text=f"{question.text} \nAnswer only with the letter! \n")
    assert prompt_of(alike) == prompt_of(question, prompt="mmstar")
    assert prompt_of(question) != prompt_of(question, prompt="mmstar")


def test_all_are_counted_as_they_are_answered() -> None:
    counted: list[int] = []
    saved_model(batch_size=5).answers(some(12), SHORT, counted.append)
    assert counted == [5, 5, 2]


def test_an_answer_ends_where_there_are_no_positions_left() -> None:
    model = VisionLanguageModel(vlm_config(lm_max_length=40, lm_max_position_embeddings=64), 3)
    saved = SavedModel(model, TOKENIZER)
    question = some()[0]
    prompt = prompt_of(question)
    (answer,) = saved.answers([question], Decoding(max_new_tokens=1000))
    assert len(answer.split()) <= 64 - model.config.num_image_tokens - len(prompt)


def test_a_question_that_is_too_long_names_its_place_and_the_numbers() -> None:
    model = VisionLanguageModel(vlm_config(lm_max_length=16, lm_max_position_embeddings=20))
    with pytest.raises(UserError, match=r"row \d+: 4 image tokens \+ \d+ of .*embeddings=20"):
        SavedModel(model, TOKENIZER).answers(some(), SHORT)


def test_continuations_are_weighed_as_the_model_weighs_them() -> None:
    saved = saved_model(seed=8, batch_size=3)  # answers with several words
    questions = some(40)
    likeliest = saved.answers(questions, Decoding(max_new_tokens=1))
    asked = [(q, f" {word}") for q, word in zip(questions, likeliest, strict=True) if word]
    assert len({word for _, word in asked}) > 3
    weighed = saved.continuations([*asked, (questions[0], "C D")])
    assert all(is_likeliest for _, is_likeliest in weighed[:-1])
    assert not weighed[-1][1]
    assert weighed[-1][0] == pytest.approx(loss_of(saved, questions[0], "C D"), rel=1e-5)


def loss_of(saved: SavedModel, question: Question, ending: str) -> float:
    """Return the mean loss of the ending, by the model's own forward pass on one padded text."""
    (prompt,) = QuestionReader(VLM, TOKENIZER).read([question])
    tokens = TOKENIZER.encode(ending).ids
    row = torch.tensor([prompt.text + tokens])
    with torch.no_grad():
        pixels = image_input(QuestionReader(VLM, TOKENIZER).pixels([(question, prompt)]), VLM)
        logits, _ = saved.model(row, pixels)
    return F.cross_entropy(logits[0, len(prompt.text) - 1 : -1], torch.tensor(tokens)).item()


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(UserError, match="row 0: there is no token in ' , ' to weigh"):
        saved_model().continuations([(digit_questions()[0], " , ")])


def test_images_are_prepared_as_for_training() -> None:
    """Transparent pixels on white, any mode as RGB, squashed to the model's square."""
    clear = Image.new("RGBA", (50, 20), (255, 0, 0, 0))
    question, reader = Question("", opened(clear), ""), QuestionReader(VLM, TOKENIZER)
    pixels = reader.pixels([(question, reader.read([question])[0])])
    assert torch.equal(pixels, torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, Decoding()),
        ({"until": ["\n\n"], "do_sample": False}, Decoding(until=("\n\n",))),
        ({"max_new_tokens": 16, "temperature": 0.0, "num_beams": 1}, Decoding(max_new_tokens=16)),
        ({"do_sample": False, "temperature": 0.7}, Decoding()),
        ({"do_sample": True, "temperature": 0}, Decoding()),
        ({"until": "END"}, Decoding(until=("END",))),
        ({"until": ["", "a"]}, Decoding(until=("a",))),
    ],
)  # fmt: skip
def test_generation_keywords(keywords: dict[str, Any], expected: Decoding) -> None:
    assert Decoding.of(keywords) == expected


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"do_sample": True}, "got do_sample=True; --gen_kwargs do_sample=False"),
        ({"temperature": 0.7}, "got temperature=0.7"),
        ({"num_beams": 4}, "got num_beams=4"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be a whole number above 0, got 0"),
        ({"max_new_tokens": "ten"}, "got 'ten'"),
        ({"max_new_tokens": True}, "got True"),
    ],
)
def test_generation_keywords_that_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decoding.of(keywords)


def test_an_answer_ends_at_the_first_stop() -> None:
    decoding = Decoding(until=("\n\n", "END"))
    assert decoding.end(" A END of\n\nit") == "A"
    assert decoding.end("B\n\nA END") == "B"
    assert decoding.end("no stop") == "no stop"


def test_one_image_is_wanted() -> None:
    image, other = Image.new("L", (2, 2), 7), Image.new("L", (2, 2), 9)
    assert take_images([image], "row 3", "one") == [image]
    for visuals, number in ((None, 0), ([], 0), ([image, other], 2)):
        with pytest.raises(UserError, match=f"row 3: has {number} images.*images=first"):
            take_images(visuals, "row 3", "one")
    assert take_images([image, other], "row 3", "first") == [image]
    (black,) = take_images(None, "row 3", "first")
    assert black.convert("RGB").getextrema() == ((0, 0),) * 3
    assert take_images([image, other], "row 3", "all") == [image, other]
    assert take_images(None, "row 3", "all") == []
    for images in ("one", "first", "all"):
        with pytest.raises(UserError, match="row 3: must come with images, got a str"):
            take_images(["film.mp4"], "row 3", images)


def test_a_saved_folder_is_loaded_and_a_missing_one_is_named(tmp_path: Path) -> None:
    VisionLanguageModel(VLM, seed=1).save_pretrained(tmp_path)
    answers = SavedModel.load(str(tmp_path), CPU).answers(some(), SHORT)
    assert answers == saved_model().answers(some(), SHORT)
    with pytest.raises(UserError, match="pretrained='/nowhere/best'"):
        SavedModel.load("/nowhere/best", CPU)


def test_bfloat16_changes_the_products_alone() -> None:
    questions = [(question, "A") for question in some(6)]
    exact = saved_model(precision="float32").continuations(questions)
    rounded = saved_model(precision="bfloat16").continuations(questions)
    assert exact == saved_model(precision="auto").continuations(questions)
    assert exact != rounded
    for (a, _), (b, _) in zip(exact, rounded, strict=True):
        assert a == pytest.approx(b, rel=0.05)
