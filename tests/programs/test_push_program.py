"""`python -m nanovlm push`: the winner of a search on the hub, with what is known of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from nanovlm import cli
from nanovlm.__main__ import main
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.results.write import ResultsStore
from tests.fake_hub import FakeHub
from tests.programs.test_generate_program import CONFIG
from tests.records import make_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a results folder with one trial, as a search writes it."""
    store = ResultsStore(
        tmp_path / "results", Objective(metric="train_loss", mode="min"), gpus_per_trial=0
    )
    model = tmp_path / "results" / "checkpoints" / "trial-0000"
    VisionLanguageModel(CONFIG, seed=2).save_pretrained(model)
    config = TrainConfig(vlm=CONFIG, lr_mp=0.0123, train_dataset_path="some/data@0123abc")
    record = make_record(
        0,
        metrics={"mmstar_accuracy": 0.5, "mmstar_num_items": 400.0, "train_loss": 1.5},
        config=config_values(config),
    )
    store.begin()
    store.take(record)
    store.write_summary(wall_seconds=1.0)
    return tmp_path / "results"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_for_tests")
    with pytest.raises(SystemExit) as ended:
        cli.run_program(lambda: main(["push", "--repo", "me/vlm", *arguments]))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_winner_of_a_search(
    hub: FakeHub,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--checkpoint", str(results / "best"), "--private") == 0
    repository = hub.repositories["model", "me/vlm"]
    commit, files = list(repository.commits.items())[-1]
    assert capsys.readouterr().out == f"{hub.url}/me/vlm/commit/{commit}\n"
    assert repository.private
    weights = load_file(results / "best" / "model.safetensors")
    pushed = load(files["model.safetensors"])
    assert pushed.keys() == weights.keys()
    assert all(torch.equal(pushed[name], weights[name]) for name in weights)
    card = files["README.md"].decode()
    assert "| `lr_mp` | `0.0123` |" in card and "datasets:\n- some/data\n" in card
    assert "**0.500**, 95 % interval 0.451 to 0.549\n(400 questions)" in card


def test_a_model_that_lies_elsewhere(
    hub: FakeHub, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (results / "best").rename(results / "moved")
    assert run(monkeypatch, "--checkpoint", str(results / "moved")) == 0
    card = list(hub.repositories["model", "me/vlm"].commits.values())[-1]["README.md"].decode()
    assert "## Use" in card and "## Training" not in card


def test_no_model(
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--checkpoint", str(tmp_path / "none")) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert hub.repositories == {}
