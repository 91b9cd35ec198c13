"""`python -m nanovlm generate`, as a user runs it, on a model that is small enough for tests."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nanovlm import cli
from nanovlm.__main__ import main
from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import digits_tokenizer
from nanovlm.data.images import resize_to_uint8
from nanovlm.data.text import encode
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.fake_hub import FakeHub

REPOSITORY = Path(__file__).parents[2]
QUESTION = "Which digit is this?\nOptions: A: 1, B: 3, C: 7, D: 9"
CONFIG = VLMConfig(
    vit_hidden_dim=16, vit_patch_size=8, vit_img_size=32, vit_n_heads=2, vit_n_blocks=1,
    lm_hidden_dim=16, lm_inter_dim=24, lm_vocab_size=64, lm_n_heads=4, lm_n_kv_heads=2,
    lm_n_blocks=1, lm_max_length=32, lm_max_position_embeddings=64, lm_tokenizer="builtin:digits",
    lm_dropout=0.5, vlm_load_backbone_weights=False, vlm_checkpoint_path="",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a saved model in model/, an image and a file that is none."""
    VisionLanguageModel(CONFIG, seed=2).save_pretrained(tmp_path / "model")
    Image.effect_mandelbrot((40, 30), (-3, -2.5, 2, 2.5), 20).save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    return tmp_path


def expected_tokens(folder: Path, **options: Any) -> list[int]:
    """Return what the model of the folder generates, asked directly."""
    model = VisionLanguageModel.from_pretrained(folder / "model").eval()
    (prompt,) = encode(digits_tokenizer(), [f"Question: {QUESTION} Answer:"])
    pixels = resize_to_uint8(Image.open(folder / "image.png").convert("RGB"), 32, "bicubic")
    images = image_input(torch.from_numpy(pixels)[None], model.config)
    tokens: list[int] = model.generate(torch.tensor([prompt]), images, **options)[0].tolist()
    return tokens


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *more: str,
    **changes: str,
) -> tuple[int, str, str]:
    """Run the program in this process; return its exit code and what it wrote."""
    values = {"checkpoint": "model", "image": "image.png", "prompt": QUESTION} | changes
    arguments = [f"--{name}={value}" for name, value in values.items()]
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        cli.run_program(lambda: main(["generate", *arguments, "--device", "cpu", *more]))
    assert isinstance(ended.value.code, int)
    return (ended.value.code, *capsys.readouterr())


@pytest.mark.slow
def test_the_likeliest_answer(folder: Path) -> None:
    command = [sys.executable, "-m", "nanovlm", "generate", "--checkpoint", str(folder / "model")]
    command += ["--image", str(folder / "image.png"), "--prompt", QUESTION]
    command += ["--max-new-tokens", "7", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tokens = expected_tokens(folder, max_new_tokens=7)
    assert len(tokens) == 7 and CONFIG.lm_eos_token_id not in tokens
    assert done.stdout == digits_tokenizer().decode(tokens) + "\n"
    assert done.stderr == ""


def test_an_answer_ends_at_eos(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    third = expected_tokens(folder, max_new_tokens=7)[2]
    ending = dataclasses.replace(CONFIG, lm_eos_token_id=third)
    VisionLanguageModel(ending, seed=2).save_pretrained(folder / "model")
    code, output, _ = run(folder, monkeypatch, capsys)
    before = expected_tokens(folder, max_new_tokens=7)
    assert code == 0
    assert output == digits_tokenizer().decode(before[: before.index(third)]) + "\n"


def test_a_drawn_answer_depends_on_the_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = ("--temperature=1.5", "--top-k=20", "--top-p=0.9", "--max-new-tokens=12")
    first, again, other = (
        run(folder, monkeypatch, capsys, *numbers, f"--seed={seed}") for seed in (5, 5, 6)
    )
    tokens = expected_tokens(
        folder, greedy=False, temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=12,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    assert first == again == (0, digits_tokenizer().decode(tokens).strip() + "\n", "")
    assert other != first


def test_a_model_from_the_hub(
    hub: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.add("model", "some/vlm", folder / "model")
    from_folder = run(folder, monkeypatch, capsys)
    code, output, _ = run(folder, monkeypatch, capsys, checkpoint="some/vlm")
    assert (code, output) == from_folder[:2]
    assert code == 0 and output


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"image": "nowhere.png"}, (), "--image: nowhere.png cannot be read as an image: "),
        ({"image": "text.png"}, (), "--image: text.png cannot be read as an image: "),
        ({"image": "cut.png"}, (), "--image: cut.png cannot be read as an image: "),
        ({"checkpoint": "./nowhere"}, (), "--checkpoint='./nowhere': there is no folder"),
        ({"checkpoint": "."}, (), "holds no config.json"),
        ({"prompt": 60 * "1 "}, (), "exceed the model's lm_max_position_embeddings=64"),
        ({}, ("--max-new-tokens=60",), "+ 60 of the answer exceed the model's"),
        ({}, ("--max-new-tokens=0",), "must be a whole number of at least 1"),
        ({}, ("--temperature=0",), "must be a number above 0, got '0'"),
        ({}, ("--temperature=1", "--top-p=1.5"), "--top-p: must be at most 1, got 1.5"),
        ({}, ("--top-k=3",), "--top-k: nothing is drawn at random without --temperature"),
        ({}, ("--seed=-1",), "--seed: must be at least 0"),
        ({}, ("--device=tpu9",), "--device: 'tpu9' cannot be used"),
    ],
)
def test_mistakes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    more: tuple[str, ...],
    message: str,
) -> None:
    code, output, error = run(folder, monkeypatch, capsys, *more, **changes)
    assert code == 2 and output == ""
    assert message in error and "Traceback" not in error


def test_all_mistakes_are_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, error = run(
        folder, monkeypatch, capsys, "--top-k=3", "--seed=-1", image="a", checkpoint="./b"
    )
    assert [line.split(":")[1].split("=")[0].strip() for line in error.splitlines()] == [
        "--top-k", "--seed", "--image", "--checkpoint",
    ]  # fmt: skip
