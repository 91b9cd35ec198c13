"""A saved 8k model answers questions about any number of images, as nanoVLM would ask them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from nanovlm import cli
from nanovlm.__main__ import main
from nanovlm.config.generations import V8K
from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.tiles import Tiling, cut_into_tiles
from nanovlm.errors import UserError
from nanovlm.evaluation import answering
from nanovlm.evaluation.answering import Decoding, SavedModel
from nanovlm.evaluation.questions import Question, QuestionReader
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.hub_data import write_tokenizer
from tests.tiny import vlm_config

EXTRA = V8K.extra_tokens
CHATML = build_config(preset_layer("nanovlm-460m-8k")).vlm.lm_chat_template
TEXTS = ["What is shown here?", "A red circle, and 12 blue bars.", "Yes.", "user assistant \n"]
SHORT = Decoding(max_new_tokens=6)

WIDE = Image.effect_mandelbrot((30, 20), (-3, -2.5, 2, 2.5), 20)
"""30 x 20 pixels: 2 x 2 tiles of 16, and the global one."""
SMALL = Image.effect_mandelbrot((9, 12), (-2, -1, 1, 1), 20)
"""A single tile."""
GRIDS = {id(WIDE): Tiling(2, 2), id(SMALL): Tiling(1, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved model with random weights, and the folder of its tokenizer beside it."""
    path = tmp_path_factory.mktemp("tiled")
    tokenizer = write_tokenizer(path / "tokenizer", TEXTS, 300)
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    vlm = vlm_config(
        generation="8k",
        vit_patch_size=4,
        vit_img_size=16,
        max_img_size=32,
        lm_vocab_size=size + len(EXTRA),
        lm_max_length=128,
        lm_max_position_embeddings=128,
        lm_tokenizer=str(tokenizer),
        lm_chat_template=CHATML,
        lm_tie_weights=False,  # or answers would repeat one token
    )
    VisionLanguageModel(vlm, seed=58).save_pretrained(path / "model")
    return path


@pytest.fixture
def saved(folder: Path) -> SavedModel:
    return SavedModel.load(str(folder / "model"))


def question(text: str, *images: Image.Image) -> Question:
    return Question(text, lambda: images, f"question {text!r}")


QUESTIONS = [
    question("What is shown here?", WIDE),
    question("Yes."),
    question("What is red?", SMALL, WIDE),
    question("A circle?", SMALL),
]


def marked(*grids: Tiling) -> str:
    """Return the published string of images, with 4 image tokens a tile."""
    text = ""
    for number, grid in enumerate(grids):
        text += f"<image: {number}>" * (len(grids) > 1) + "<|global_image|>" + "<|image|>" * 4
        for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)) if grid.num_tiles > 1 else ():
            text += f"<row_{row}_col_{column}>" + "<|image|>" * 4
    return text


def published(vlm: VLMConfig, asked: Question) -> tuple[Tensor, Tensor]:
    """Return what nanoVLM gives the model: all tokens with placeholders, and the tiles."""
    tokenizer = AutoTokenizer.from_pretrained(vlm.lm_tokenizer, extra_special_tokens=dict(EXTRA))
    images = [*asked.images()]
    grids = [GRIDS[id(image)] for image in images]
    messages = [{"role": "user", "content": marked(*grids) + asked.text}]
    tokenizer.chat_template = vlm.lm_chat_template
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tiles = [
        torch.tensor(cut_into_tiles(image.convert("RGB"), grid, 16, vlm.image_resampling))
        for image, grid in zip(images, grids, strict=True)
    ]
    none = torch.empty((0, 3, 16, 16), dtype=torch.uint8)
    return torch.tensor([ids]), image_input(torch.cat([none, *tiles]), vlm)


def test_answers_are_those_of_the_published_prompt(saved: SavedModel) -> None:
    answers = saved.answers(QUESTIONS, SHORT)
    vlm = saved.model.config
    expected = []
    for asked in QUESTIONS:
        tokens = saved.model.generate(*published(vlm, asked), max_new_tokens=6)[0].tolist()
        tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
        expected.append(saved.tokenizer.decode(tokens).strip())
    assert answers == expected
    assert len(set(answers)) == len(QUESTIONS)


def test_a_prompt_has_its_placeholders_where_nanovlm_has_them(saved: SavedModel) -> None:
    vlm = saved.model.config
    for asked, prompt in zip(
        QUESTIONS, QuestionReader(vlm, saved.tokenizer).read(QUESTIONS), strict=True
    ):
        assert prompt.with_placeholders(vlm) == published(vlm, asked)[0][0].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_answers_depend_neither_on_the_batch_nor_on_the_order(
    folder: Path, saved: SavedModel, batch_size: Any
) -> None:
    other = SavedModel.load(str(folder / "model"), batch_size=batch_size)
    assert other.answers(QUESTIONS[::-1], SHORT)[::-1] == saved.answers(QUESTIONS, SHORT)


def test_continuations_are_weighed_behind_all_tiles(saved: SavedModel) -> None:
    weighed = saved.continuations([(asked, " blue bars.") for asked in QUESTIONS])
    ending = torch.tensor(saved.tokenizer.encode("blue bars.", add_special_tokens=False).ids)
    for asked, (loss, is_likeliest) in zip(QUESTIONS, weighed, strict=True):
        prompt, pixels = published(saved.model.config, asked)
        row = torch.cat((prompt, ending[None]), dim=1)
        with torch.no_grad():
            logits = saved.model(row, pixels)[0][0, prompt.shape[1] - 1 : -1]
        assert loss == pytest.approx(F.cross_entropy(logits, ending).item(), rel=1e-5)
        assert is_likeliest == bool((logits.argmax(dim=1) == ending).all())


def test_tiles_decide_how_many_questions_are_read_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 16 patches and 4 tokens costs 20, and each question has fewer than 40 of text."""
    monkeypatch.setattr(answering, "TILED_COSTS", {"cpu": 2 * (5 * 20 + 40)})
    counted: list[int] = []
    many = [question("What is shown here?", WIDE)] * 5
    SavedModel.load(str(folder / "model")).answers(many, SHORT, counted.append)
    assert counted == [2, 2, 1]
    counted.clear()
    SavedModel.load(str(folder / "model"), batch_size=5).answers(many, SHORT, counted.append)
    assert counted == [5]


def test_an_image_token_in_a_question_is_no_image(saved: SavedModel) -> None:
    with_token = question("What is <|im<|image|>age|><|image|>shown here?", WIDE)
    assert saved.answers([with_token], SHORT) == saved.answers(QUESTIONS[:1], SHORT)


def test_the_wording_of_mmstar(folder: Path, saved: SavedModel) -> None:
    own = SavedModel.load(str(folder / "model"), prompt="mmstar")
    text = "Yes.\nAnswer with the option's letter from the given choices directly"
    assert own.answers([question("Yes.")], SHORT) == saved.answers([question(text)], SHORT)


def test_a_question_with_more_tiles_than_positions_is_refused(saved: SavedModel) -> None:
    images = [WIDE] * 6
    with pytest.raises(UserError, match=r"question 'Yes\.': 120 image tokens \+ \d+ of question"):
        saved.answers([question("Yes.", *images)], SHORT)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python -m nanovlm generate` in this process; return its code and what it wrote."""
    WIDE.save(folder / "wide.png")
    SMALL.save(folder / "small.png")
    monkeypatch.chdir(folder)

    def generate(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run_program(lambda: main(["generate", "--device=cpu", *arguments]))
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capsys.readouterr())

    return generate


def test_the_program_reads_several_images_or_none(saved: SavedModel, run: Run) -> None:
    asked = "--checkpoint=model", "--max-new-tokens=6"
    two = run(*asked, "--prompt=What is red?", "--image=small.png", "--image=wide.png")
    none = run(*asked, "--prompt=Yes.")
    _, of_none, of_two, _ = saved.answers(QUESTIONS, SHORT)
    assert (two, none) == ((0, f"{of_two}\n", ""), (0, f"{of_none}\n", ""))


@pytest.mark.parametrize("number", [0, 2])
def test_other_generations_read_one_image(tmp_path: Path, run: Run, number: int) -> None:
    VisionLanguageModel(vlm_config()).save_pretrained(tmp_path)
    code, _, error = run(f"--checkpoint={tmp_path}", "--prompt=?", *["--image=wide.png"] * number)
    assert code == 2
    assert f"--image: a model of generation v0.1 reads exactly one image, got {number}" in error
