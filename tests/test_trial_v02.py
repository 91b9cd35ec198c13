"""A model of nanoVLM v0.2 from the data to the answer of the saved model, on the digits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.__main__ import main
from nanovlm.config.generations import PUBLISHED_IMAGES
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import Layer, build_config
from nanovlm.data.digits import digits_tokenizer
from nanovlm.messages import Job, Report
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.training.start import start_layers
from nanovlm.trial import run_trial
from tests.tiny import digits_config, vlm_config

VLM = vlm_config(generation="v0.2", lm_max_length=79 + 4, **PUBLISHED_IMAGES)
CONFIG = digits_config(VLM, lr_mp=1e-3, lr_backbones=1e-3, batch_size=16, seed=1)


@pytest.fixture(scope="module")
def resources() -> Resources:
    return Resources("cpu")


@pytest.fixture(scope="module")
def trained(resources: Resources, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The folder of the trained model, and the last report."""
    folder = tmp_path_factory.mktemp("v02") / "model"
    job = Job(trial_id="t", config=CONFIG, output_dir=str(folder))
    *_, last = run_trial(job, resources)
    return folder, last


def last_report(config: TrainConfig, resources: Resources) -> Report:
    *_, last = run_trial(Job(trial_id="t", config=config), resources)
    return last


def test_the_numbers_are_those_of_v01(resources: Resources, trained: tuple[Path, Report]) -> None:
    """The image in front by placeholders or without: the same positions, texts and logits.

    Also in one worker, which keeps the data and the model of neither for the other.
    """
    vlm = dataclasses.replace(VLM, generation="v0.1", lm_max_length=79)
    assert last_report(dataclasses.replace(CONFIG, vlm=vlm), resources).metrics == (
        trained[1].metrics
    )
    shorter = dataclasses.replace(VLM, lm_max_length=22 + 4)  # texts have 8, 22, 25 or 26 tokens
    data, _ = resources.training_data(dataclasses.replace(CONFIG, vlm=shorter, batch_size=1))
    assert int(data.offsets.diff().max()) == 22


def test_the_saved_model_goes_on_training(
    resources: Resources, trained: tuple[Path, Report]
) -> None:
    folder, _ = trained
    values = {"resume_from_vlm_checkpoint": True, "vlm.vlm_checkpoint_path": str(folder)}
    given = build_config(Layer("command line", values), below=start_layers).vlm
    assert (given.generation, given.lm_max_length) == ("v0.2", 83)
    vlm = dataclasses.replace(VLM, vlm_checkpoint_path=str(folder))
    again = dataclasses.replace(CONFIG, resume_from_vlm_checkpoint=True, vlm=vlm)
    assert last_report(again, resources).metrics["val_loss"] < trained[1].metrics["val_loss"]


def test_the_saved_model_answers(
    trained: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a question that spells the image token, which is text."""
    folder, _ = trained
    assert "image_mean" not in json.loads((folder / "config.json").read_text())
    model = VisionLanguageModel.from_pretrained(folder)
    assert model.config == dataclasses.replace(VLM, vit_inter_dim=64)
    Image.effect_mandelbrot((40, 30), (-3, -2.5, 2, 2.5), 20).save(tmp_path / "image.png")
    words = ["--checkpoint", str(folder), "--image", str(tmp_path / "image.png")]
    words += ["--prompt", "<|image|> Which digit is this?", "--device", "cpu"]
    assert main(["generate", *words, "--max-new-tokens=3"]) == 0
    answer = capsys.readouterr().out.strip()
    vocabulary = digits_tokenizer().get_vocab()
    assert all(word in vocabulary for word in answer.split())
    assert torch.isfinite(model.MP.proj.weight).all()
