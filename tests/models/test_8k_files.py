"""Files of nanoVLM's 8k models: read, trained on, written again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.config.generations import V8K
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import Layer, build_config, config_values, earlier_values, preset_layer
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.start import find_checkpoint, load_checkpoint, start_layers
from tests.models.v02_files import CHANGES_8K, CHAT_TEMPLATE, CONFIG, Parts, make_parts
from tests.models.v02_files import write_checkpoint as write


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(96)


@pytest.fixture
def published(tmp_path: Path, parts: Parts) -> Path:
    return write(tmp_path / "published", parts, **CHANGES_8K)


def saved_values(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text())}


def errors_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        VisionLanguageModel.from_pretrained(folder)
    return caught.value.messages


@pytest.mark.parametrize(
    ("preset", "parameters", "width"),
    [("nanovlm-460m-8k", 460_113_984, 960), ("nanovlm-230m-8k", 228_063_936, 576)],
)
def test_the_presets_are_the_published_models(preset: str, parameters: int, width: int) -> None:
    config = build_config(preset_layer(preset))
    with torch.device("meta"):
        model = VisionLanguageModel(config.vlm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.decoder.head.weight.shape == (49_218, width)
    assert (config.vlm.num_image_tokens, config.vlm.image_token_id) == (64, 49_152)
    assert config.vlm.max_text_length == config.vlm.lm_max_length == 4096
    assert config.peak_learning_rates == {
        "mp": 5.12e-3, "vision_backbone": 5e-5, "language_backbone": 5e-5,
    }  # fmt: skip
    assert config.batch_size * (config.max_steps or 0) == 512 * 40_000


def test_a_published_checkpoint_comes_back_as_nanovlm_reads_it(
    published: Path, tmp_path: Path
) -> None:
    """nanoVLM passes the file to a dataclass, which refuses keys that are not its own."""
    model = VisionLanguageModel.from_pretrained(published)
    assert (model.config.generation, model.config.lm_eos_token_id) == ("8k", 2)
    assert model.config.lm_chat_template == CHAT_TEMPLATE
    assert (model.config.max_img_size, model.config.image_token_id) == (128, 30)
    assert model.config.image_mean == (0.0, 0.0, 0.0)
    model.save_pretrained(tmp_path / "again")
    values = saved_values(tmp_path / "again")
    expected = {key: value for key, value in (CONFIG | CHANGES_8K).items() if value is not None}
    assert values == expected and len(values) == 37
    assert list(values["vlm_extra_tokens"]) == list(expected["vlm_extra_tokens"])  # gives the ids
    before, after = (load_file(f / "model.safetensors") for f in (published, tmp_path / "again"))
    assert after.keys() == before.keys() and len(before) == 60
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert VisionLanguageModel.from_pretrained(tmp_path / "again").config == model.config


def test_a_model_with_the_tokenizers_template_comes_back(
    published: Path, tmp_path: Path, parts: Parts
) -> None:
    model = VisionLanguageModel.from_pretrained(published, lm_chat_template=None)
    model.save_pretrained(tmp_path / "again")
    assert saved_values(tmp_path / "again")["lm_chat_template"] is None
    assert VisionLanguageModel.from_pretrained(tmp_path / "again").config == model.config


def test_what_a_file_leaves_out_is_as_in_the_preset(tmp_path: Path, parts: Parts) -> None:
    absent = dict.fromkeys(("lm_max_length", "lm_chat_template", "resize_to_max_side_len"))
    folder = write(tmp_path, parts, **CHANGES_8K | absent)
    config = VisionLanguageModel.from_pretrained(folder).config
    preset = build_config(preset_layer(V8K.preset)).vlm
    assert config.lm_max_length == 4096
    assert config.lm_chat_template == preset.lm_chat_template
    assert config.resize_to_max_side_len is False


def test_a_run_starts_from_it(published: Path) -> None:
    values = {"resume_from_vlm_checkpoint": True, "vlm.vlm_checkpoint_path": str(published)}
    config = build_config(Layer("command line", values), below=start_layers).vlm
    assert (config.generation, config.lm_eos_token_id, config.lm_max_length) == ("8k", 2, 4096)
    assert (config.max_img_size, config.lm_chat_template) == (128, CHAT_TEMPLATE)
    model = VisionLanguageModel(config, seed=3)
    load_checkpoint(model, str(published))
    stored = load_file(published / "model.safetensors")
    assert [n for n in stored if not torch.equal(model.state_dict()[n], stored[n])] == []


def test_a_run_that_starts_from_it_may_cut_images_otherwise(published: Path) -> None:
    values = {
        "resume_from_vlm_checkpoint": True,
        "vlm": {
            "vlm_checkpoint_path": str(published),
            "max_img_size": 64,
            "resize_to_max_side_len": True,
            "lm_chat_template": "other",
        },
    }
    config = build_config(Layer("command line", values), below=start_layers).vlm
    assert (config.max_img_size, config.lm_chat_template) == (64, "other")
    assert find_checkpoint(str(published), config) == published


def test_unknown_keys_are_told_with_the_generation(tmp_path: Path, parts: Parts) -> None:
    folder = write(tmp_path, parts, **CHANGES_8K | {"max_image_size": 128, "lm_eos_token_id": 0})
    [message] = errors_of(folder)
    assert message.startswith(f"{folder / 'config.json'}: looks like a model of nanoVLM 8k (")
    assert message.endswith(
        "which has no such key: 'max_image_size' (did you mean 'max_img_size'?)"
    )


@pytest.mark.parametrize("shift", [lambda tokens: tokens[::-1], lambda tokens: tokens[:-1]])
def test_extra_tokens_in_another_order_or_number_are_refused(
    tmp_path: Path, parts: Parts, shift: Any
) -> None:
    tokens = dict(shift(list(CHANGES_8K["vlm_extra_tokens"].items())))
    [message] = errors_of(write(tmp_path, parts, **CHANGES_8K | {"vlm_extra_tokens": tokens}))
    assert "looks like a variant of nanoVLM 8k" in message


def test_a_file_with_tiles_and_no_extra_tokens_is_refused(tmp_path: Path, parts: Parts) -> None:
    [message] = errors_of(write(tmp_path, parts, **CHANGES_8K | {"vlm_extra_tokens": None}))
    assert "looks like a variant of nanoVLM 8k" in message and message.count("got None") == 1


def tiled(**changes: Any) -> VLMConfig:
    values = {"lm_vocab_size": 49_218, "lm_max_length": 512, "max_img_size": 448}
    return VLMConfig(generation="8k", **(values | changes))


@pytest.mark.parametrize("size", [None, 300, 224 * 9])
def test_tiles_fill_the_largest_image(size: int | None) -> None:
    rule = r"max_img_size must be a multiple of vit_img_size=224 up to 1792 in generation 8k, got"
    with pytest.raises(ValueError, match=f"{rule} {size}"):
        tiled(max_img_size=size)
    assert tiled(max_img_size=224 * 8).max_img_size == 1792


def test_other_generations_have_no_tiles() -> None:
    with pytest.raises(UserError) as caught:
        values = {"max_img_size": 448, "resize_to_max_side_len": True, "lm_chat_template": "{}"}
        build_config(Layer("file", {"vlm": values}))
    assert caught.value.messages == (
        "file: lm_chat_template, max_img_size, resize_to_max_side_len: only models of generation "
        "8k have tiles and conversations, this one is of v0.1",
    )


def test_the_length_includes_all_tiles() -> None:
    assert tiled().max_text_length == 512
    assert tiled(lm_max_length=8192).max_text_length == 8192
    with pytest.raises(ValueError, match="lm_max_length=49 leaves no room for text: in generation"):
        tiled(lm_max_length=49)
    with pytest.raises(ValueError, match="lm_max_length=8193 exceeds lm_max_position_embeddings"):
        tiled(lm_max_length=8193)


def test_configurations_from_before_the_8k_generation_have_its_defaults() -> None:
    """Of results folders that an earlier version wrote."""
    values = config_values(TrainConfig())
    for key in ("lm_chat_template", "max_img_size", "resize_to_max_side_len"):
        del values["vlm"][key]
    del values["max_images_per_example"]
    found = earlier_values(values)
    assert found["max_images_per_example"] == 4
    assert build_config(Layer("earlier", found)) == TrainConfig()
