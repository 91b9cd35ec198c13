"""Models from a hub and to a hub: the real client against a hub on this machine."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from nanovlm import downloads
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.errors import UserError
from nanovlm.hub import Score, push_to_hub
from nanovlm.models.pretrained import load_backbone_weights
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.start import load_checkpoint
from tests.fake_hub import FakeHub
from tests.hub_files import make_llama, make_two_towers

TOKEN = "hf_a_token_for_tests"


@pytest.fixture
def model(tiny: VLMConfig) -> VisionLanguageModel:
    return VisionLanguageModel(dataclasses.replace(tiny, lm_tie_weights=True), seed=9)


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert [n for n, t in actual.state_dict().items() if not torch.equal(t, theirs[n])] == []


def go_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    downloads.forget_downloads()
    hub.requests.clear()


def test_a_saved_model_from_the_hub(
    hub: FakeHub, model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    first = hub.add("model", "some/vlm", tmp_path / "model")
    second = VisionLanguageModel(model.config, seed=1)
    second.save_pretrained(tmp_path / "model")
    hub.add("model", "some/vlm", tmp_path / "model")
    warm = VisionLanguageModel(model.config, seed=3)
    for _ in ("online", "offline"):
        assert_same_weights(VisionLanguageModel.from_pretrained("some/vlm"), second)
        old = VisionLanguageModel.from_pretrained("some/vlm", revision=first, lm_dropout=0.25)
        assert_same_weights(old, model)
        assert old.config.lm_dropout == 0.25
        load_checkpoint(warm, "some/vlm")
        assert_same_weights(warm, second)
        go_offline(hub, monkeypatch)
    assert hub.requests == []


def test_backbones_from_the_hub(
    hub: FakeHub,
    tiny: VLMConfig,
    tmp_path: Path,
    randomize: Callable[[nn.Module], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    siglip, llama = str(tmp_path / "siglip"), str(tmp_path / "llama")
    local = dataclasses.replace(tiny, vit_model_type=siglip, lm_model_type=llama)
    make_two_towers(local, randomize, max_shard_size="20KB")
    make_llama(local, randomize)
    for name in ("siglip", "llama"):
        hub.add("model", f"some/{name}", tmp_path / name)
    config = dataclasses.replace(tiny, vit_model_type="some/siglip", lm_model_type="some/llama")
    expected = VisionLanguageModel(local)
    load_backbone_weights(expected)
    for _ in ("online", "offline"):
        model = VisionLanguageModel(config)
        load_backbone_weights(model)
        assert_same_weights(model, expected)
        go_offline(hub, monkeypatch)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("not/here", None, "Repository Not Found"),
        (
            "some/vlm",
            "v2",
            "at revision v2 came neither from the hub nor from its cache: Revision Not Found",
        ),
        ("some/config", None, "holds no model.safetensors"),
        ("some/nothing", None, "holds none of these files"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: FakeHub, tmp_path: Path, name: str, revision: str | None, reason: str
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "other.txt").write_text("other")
    hub.add("model", "some/vlm", tmp_path / "nothing")
    hub.add("model", "some/nothing", tmp_path / "nothing")
    (tmp_path / "nothing" / "config.json").write_text("{}")
    hub.add("model", "some/config", tmp_path / "nothing")
    with pytest.raises(UserError) as caught:
        VisionLanguageModel.from_pretrained(name, revision=revision)
    [message] = caught.value.messages
    assert reason in message


def test_what_is_pushed_comes_back(
    hub: FakeHub, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = push_to_hub(model, "me/vlm", private=True, token=TOKEN)
    repository = hub.repositories["model", "me/vlm"]
    assert repository.private
    assert address == f"{hub.url}/me/vlm/commit/{list(repository.commits)[-1]}"
    for _ in ("online", "offline"):
        loaded = VisionLanguageModel.from_pretrained("me/vlm")
        assert_same_weights(loaded, model)
        assert loaded.config == dataclasses.replace(model.config, vit_inter_dim=128)
        go_offline(hub, monkeypatch)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    score = Score(accuracy=0.353, interval_95=(0.329, 0.378), num_items=1500)
    training = TrainConfig(vlm=model.config, lr_mp=0.003)
    changed = VisionLanguageModel(model.config, seed=1)
    push_to_hub(changed, "me/vlm", token=TOKEN, training=training, score=score)
    assert_same_weights(VisionLanguageModel.from_pretrained("me/vlm"), changed)
    old, new = list(repository.commits.values())[-2:]
    assert old["config.json"] == new["config.json"]
    assert b"**0.353**" in new["README.md"] and b"**0.353**" not in old["README.md"]
    assert json.loads(new["config.json"])["lm_tie_weights"] is True
    assert b"datasets:\n- HuggingFaceM4/the_cauldron" in new["README.md"]
    local = dataclasses.replace(training, train_dataset_path="builtin:digits")
    push_to_hub(changed, "me/vlm", token=TOKEN, training=local)
    assert b"datasets:" not in list(repository.commits.values())[-1]["README.md"]


@pytest.mark.parametrize(("repo", "token"), [("me/vlm", None), ("me//vlm", TOKEN)])
def test_a_push_that_the_hub_refuses(
    hub: FakeHub,
    model: VisionLanguageModel,
    repo: str,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match=f"push_to_hub: '{repo}' was not written: .*hf auth login"):
        push_to_hub(model, repo, token=token)
    assert hub.repositories == {}


def test_offline_with_a_part_of_the_files(
    hub: FakeHub, model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    hub.add("model", "some/vlm", tmp_path / "model")
    downloads.find_folder("model", "some/vlm", ("config.json",))
    go_offline(hub, monkeypatch)
    with pytest.raises(UserError, match=r"model='some/vlm'.*model.safetensors.*HF_HUB_OFFLINE"):
        VisionLanguageModel.from_pretrained("some/vlm")


def test_no_network_is_said_at_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"model='some/vlm'.*HF_HOME.*digits.yaml"):
        VisionLanguageModel.from_pretrained("some/vlm")
    assert time.monotonic() - start < 5
    assert "Retrying" not in capfd.readouterr().err
