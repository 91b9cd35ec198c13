"""Saved models: what the files hold, loading them, and every way in which they can be wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovlm.config.generations import PUBLISHED_IMAGES, TILED_KEYS
from nanovlm.config.schema import VLMConfig
from nanovlm.errors import UserError
from nanovlm.models import checkpoint
from nanovlm.models.vision_language_model import VisionLanguageModel

HEAD, EMBEDDING = "decoder.head.weight", "decoder.token_embedding.weight"


@pytest.fixture
def model(tiny: VLMConfig) -> VisionLanguageModel:
    return VisionLanguageModel(dataclasses.replace(tiny, lm_tie_weights=True), seed=9)


@pytest.fixture
def folder(model: VisionLanguageModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "runs" / "best")
    return tmp_path / "runs" / "best"


def assert_same_weights(actual: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    theirs = expected.state_dict()
    assert actual.state_dict().keys() == theirs.keys()
    assert [n for n, t in actual.state_dict().items() if not torch.equal(t, theirs[n])] == []


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def errors_of(folder: Path, **overrides: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        VisionLanguageModel.from_pretrained(folder, **overrides)
    return caught.value.messages


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back(tiny: VLMConfig, tmp_path: Path, tied: bool) -> None:
    model = VisionLanguageModel(dataclasses.replace(tiny, lm_tie_weights=tied), seed=9)
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(str(tmp_path))
    assert_same_weights(loaded, model)
    assert loaded.config == dataclasses.replace(model.config, vit_inter_dim=128)
    assert (loaded.decoder.head.weight is loaded.decoder.token_embedding.weight) == tied
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_files_are_those_of_nanovlm(folder: Path, model: VisionLanguageModel) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == model.state_dict().keys() - {EMBEDDING}
    values = json.loads((folder / "config.json").read_text())
    assert len(values) == 33
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_resampling": "bicubic"}
    expected = dataclasses.asdict(model.config) | {"vit_inter_dim": 128} | images
    for key in ("generation", "hf_repo_name", *TILED_KEYS):  # which nanoVLM v0.1 does not know
        del expected[key]
    assert values == expected


def test_a_file_without_image_keys_is_a_published_one_and_stays_it(
    folder: Path, tmp_path: Path
) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    published = {key: value for key, value in values.items() if not key.startswith("image_")}
    assert len(published) == 30
    path.write_text(json.dumps(published))
    loaded = VisionLanguageModel.from_pretrained(folder)
    assert loaded.config.image_mean == (0.0, 0.0, 0.0)
    assert loaded.config.image_std == (1.0, 1.0, 1.0)
    assert loaded.config.image_resampling == "bilinear"
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == published


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": (0.1, 0.2, 0.3)},
        {"image_std": (0.5, 1.0, 1.0)},
        {"image_resampling": "bicubic"},
    ],
)
def test_any_other_image_values_are_written_and_come_back(
    tiny: VLMConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(tiny, **({**PUBLISHED_IMAGES} | changes))
    VisionLanguageModel(config).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())) == 33
    loaded = VisionLanguageModel.from_pretrained(tmp_path)
    assert loaded.config == dataclasses.replace(config, vit_inter_dim=128)


def test_image_values_that_cannot_be(folder: Path) -> None:
    rewrite_config(folder, image_mean=[0.5], image_std=[0.5, 0.0, 0.5], image_resampling="area")
    messages = errors_of(folder)
    for name in ("image_mean", "image_std", "image_resampling"):
        assert any(f"vlm.{name}: must" in message for message in messages), messages


def test_either_name_of_a_tied_head_is_read(folder: Path, model: VisionLanguageModel) -> None:
    rewrite_weights(folder, lambda weights: weights.update({EMBEDDING: weights.pop(HEAD)}))
    assert_same_weights(VisionLanguageModel.from_pretrained(folder), model)


def test_weights_become_float32(folder: Path, model: VisionLanguageModel) -> None:
    rewrite_weights(folder, lambda w: w.update({HEAD: w[HEAD].bfloat16()}))
    head = VisionLanguageModel.from_pretrained(folder).decoder.head.weight
    assert head.dtype == torch.float32
    assert torch.equal(head, model.decoder.head.weight.bfloat16().float())


def test_overrides_go_before_the_file(folder: Path) -> None:
    loaded = VisionLanguageModel.from_pretrained(folder, lm_dropout=0.25)
    assert loaded.config.lm_dropout == 0.25


def test_saving_again_replaces(folder: Path, tiny: VLMConfig) -> None:
    other = VisionLanguageModel(dataclasses.replace(tiny, lm_n_blocks=1), seed=3)
    other.save_pretrained(folder)
    assert_same_weights(VisionLanguageModel.from_pretrained(folder), other)


def test_a_save_that_breaks_off_leaves_the_old_model(
    folder: Path, tiny: VLMConfig, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(model: VisionLanguageModel, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_model", half_written)
    with pytest.raises(OSError, match="disk full"):
        VisionLanguageModel(dataclasses.replace(tiny, lm_n_blocks=1)).save_pretrained(folder)
    assert_same_weights(VisionLanguageModel.from_pretrained(folder), model)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    [message] = errors_of(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    (folder / "model.safetensors").unlink()
    [message] = errors_of(folder)
    assert str(folder) in message and "model.safetensors" in message
    (folder / "config.json").unlink()
    assert len(errors_of(folder)) == 2


@pytest.mark.parametrize(("text", "rule"), [("{", "is not JSON"), ("[1]", "one JSON object")])
def test_a_config_that_is_no_object(folder: Path, text: str, rule: str) -> None:
    (folder / "config.json").write_text(text)
    [message] = errors_of(folder)
    assert str(folder / "config.json") in message and rule in message


def test_unknown_keys_and_bad_values_are_all_named(folder: Path) -> None:
    rewrite_config(folder, lm_hiden_dim=32, tokens_extra=66, lm_n_blocks="2")
    messages = errors_of(folder, vit_dropot=0.1)
    assert len(messages) == 3
    for name in ("lm_hiden_dim", "tokens_extra", "lm_n_blocks", "vit_dropot"):
        assert sum(name in message for message in messages) == 1
    assert "'lm_hiden_dim' (did you mean 'lm_hidden_dim'?), 'tokens_extra'" in messages[0]
    assert "nanoVLM v0.1 (nanoVLM-222M), which has no such keys: " in messages[0]


def test_tensors_that_do_not_fit_are_all_named(folder: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        del weights["decoder.norm.weight"], weights[HEAD]
        weights["decoder.extra"] = torch.zeros(1)
        weights["MP.proj.weight"] = torch.zeros(2, 3)

    rewrite_weights(folder, damage)
    missing, unknown, misshaped = errors_of(folder)
    assert "decoder.norm.weight" in missing and HEAD in missing and EMBEDDING in missing
    assert "decoder.extra" in unknown
    assert "MP.proj.weight [2, 3] instead of [32, 128]" in misshaped


def test_a_long_list_of_tensors_is_cut(folder: Path) -> None:
    rewrite_config(folder, lm_n_blocks=4)
    [message] = errors_of(folder)
    assert "decoder.blocks.2.norm1.weight" in message and message.endswith("and 8 more")


def test_a_weights_file_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a model")
    [message] = errors_of(folder)
    assert "model.safetensors: is not a safetensors file" in message
