"""The numbers of a model to start from: taken from its config.json, below what the user sets."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil, SiglipProcessor

from nanovlm import cli
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import Layer, build_config, config_values, load_config
from nanovlm.config.space import load_space
from nanovlm.config.start_keys import BACKBONE_NUMBERS
from nanovlm.errors import UserError
from nanovlm.models.pretrained import load_backbone_weights
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.start import BACKBONES, load_checkpoint, start_layers
from nanovlm.trial import check_backbones
from tests.fake_hub import FakeHub
from tests.hub_files import make_llama, make_siglip

SHAPES = VLMConfig(
    vit_hidden_dim=24, vit_inter_dim=40, vit_patch_size=8, vit_img_size=32, vit_n_heads=3,
    vit_n_blocks=2, vit_ln_eps=1e-4, lm_hidden_dim=40, lm_inter_dim=56, lm_rms_eps=1e-3,
    lm_re_base=777.0, lm_vocab_size=70, lm_n_heads=5, lm_n_kv_heads=1, lm_n_blocks=3,
    lm_tie_weights=False, lm_max_position_embeddings=2048,
)  # fmt: skip


def as_made(module: nn.Module) -> None:
    """Leave the weights as transformers drew them."""


@pytest.fixture
def backbones(tmp_path: Path) -> dict[str, str]:
    """Return the settings that name an encoder and a decoder of SHAPES."""
    names = {"vit_model_type": str(tmp_path / "siglip"), "lm_model_type": str(tmp_path / "llama")}
    config = dataclasses.replace(
        SHAPES, vit_model_type=names["vit_model_type"], lm_model_type=names["lm_model_type"]
    )
    make_siglip(config, as_made)
    make_llama(config, as_made)
    return {f"vlm.{key}": name for key, name in names.items()}


def build(**values: Any) -> TrainConfig:
    return build_config(Layer("command line", values), below=start_layers)


def errors_of(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        build(**values)
    return caught.value.messages


def rewrite(folder: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(folder, "config.json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_naming_the_backbones_is_enough(backbones: dict[str, str]) -> None:
    vlm = build(**backbones).vlm
    assert dataclasses.asdict(vlm) == dataclasses.asdict(SHAPES) | {
        key.removeprefix("vlm."): name for key, name in backbones.items()
    }
    load_backbone_weights(VisionLanguageModel(vlm))


SAID = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
OTHERWISE = {"image_mean": [0.9] * 3, "image_std": [0.9] * 3, "resample": 3}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": SAID},
        {"processor_config.json": {"image_processor": SAID, "processor_class": "SiglipProcessor"}},
        {"processor_config.json": {"image_processor": SAID}, "preprocessor_config.json": OTHERWISE},
        {"processor_config.json": {"image_seq_len": 9}, "preprocessor_config.json": SAID},
    ],
)
def test_images_are_prepared_as_the_encoder_knows_them(
    backbones: dict[str, str], files: dict[str, Any]
) -> None:
    for name, content in files.items():
        Path(backbones["vlm.vit_model_type"], name).write_text(json.dumps(content))
    vlm = build(**backbones).vlm
    assert (vlm.image_mean, vlm.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert vlm.image_resampling == "bilinear"
    other = build(**backbones, **{"vlm.image_resampling": "bicubic"}).vlm
    assert other.image_resampling == "bicubic"


def test_files_of_transformers_are_read(backbones: dict[str, str]) -> None:
    processor = SiglipImageProcessorPil(image_mean=[0.1] * 3, image_std=[0.2] * 3, resample=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    folder = backbones["vlm.vit_model_type"]
    SiglipProcessor(processor, tokenizer).save_pretrained(folder)
    vlm = build(**backbones).vlm
    assert (vlm.image_mean, vlm.image_std, vlm.image_resampling) == (
        (0.1,) * 3,
        (0.2,) * 3,
        "bilinear",
    )


def test_images_that_are_not_normalised_or_resized_in_a_way_of_ours(
    backbones: dict[str, str],
) -> None:
    file = Path(backbones["vlm.vit_model_type"], "preprocessor_config.json")
    file.write_text(json.dumps(SAID | {"do_normalize": False}))
    vlm = build(**backbones).vlm
    assert (vlm.image_mean, vlm.image_std) == ((0.0,) * 3, (1.0,) * 3)
    file.write_text(json.dumps(SAID | {"resample": 1}))
    [message] = errors_of(backbones)
    assert "vlm.image_resampling: must be 'bilinear' or 'bicubic', got 'resample=1'" in message
    assert build(**backbones, **{"vlm.image_resampling": "bicubic"}).vlm.image_std == (
        0.4,
        0.5,
        0.6,
    )


def test_one_of_them_leaves_the_other_at_its_defaults(backbones: dict[str, str]) -> None:
    del backbones["vlm.vit_model_type"]
    vlm = build(**backbones).vlm
    assert (vlm.lm_n_heads, vlm.lm_n_blocks) == (5, 3)
    assert (vlm.vit_n_heads, vlm.vit_n_blocks, vlm.vit_hidden_dim) == (12, 12, 768)


def give_tokenizer(folder: str, eos: str | None, reverse: bool = False) -> None:
    """Save a tokenizer of 70 words, of which the first two are special, with its EOS."""
    words = ["<text>", "<end>", *(f"w{i}" for i in range(68))]
    words = words[::-1] if reverse else words
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<text>"))
    tokenizer.add_special_tokens(["<text>", "<end>"])
    Path(folder).mkdir(exist_ok=True)
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


def test_a_decoder_brings_its_own_tokenizer_and_eos(
    backbones: dict[str, str], tmp_path: Path
) -> None:
    decoder = backbones["vlm.lm_model_type"]
    assert build(**backbones).vlm.lm_tokenizer == VLMConfig().lm_tokenizer  # it has none
    give_tokenizer(decoder, "<end>")
    vlm = build(**backbones).vlm
    assert (vlm.lm_tokenizer, vlm.lm_eos_token_id) == (decoder, 1)
    assert build(**backbones, **{"vlm.lm_eos_token_id": 0}).vlm.lm_eos_token_id == 0
    mine = str(tmp_path / "mine")
    give_tokenizer(mine, "<end>", reverse=True)
    vlm = build(**backbones, **{"vlm.lm_tokenizer": mine}).vlm
    assert (vlm.lm_tokenizer, vlm.lm_eos_token_id) == (mine, 68)
    again = build_config(
        Layer("best.yaml", config_values(TrainConfig(vlm=vlm))), below=start_layers
    )
    assert again.vlm == vlm


def test_eos_comes_from_a_tokenizer_for_random_weights_too(tmp_path: Path) -> None:
    give_tokenizer(str(tmp_path), "<end>")
    values = {"vlm.lm_tokenizer": str(tmp_path), "vlm.vlm_load_backbone_weights": False}
    assert load_config(None, "digits", values, cli.start_layers).vlm.lm_eos_token_id == 1
    give_tokenizer(str(tmp_path), None)
    assert load_config(None, "digits", values, cli.start_layers).vlm.lm_eos_token_id == 0


def test_a_tokenizer_of_another_decoder_is_refused(
    backbones: dict[str, str], tmp_path: Path
) -> None:
    decoder, mine = backbones["vlm.lm_model_type"], str(tmp_path / "mine")
    give_tokenizer(mine, "<end>")
    other = build(**backbones, **{"vlm.lm_tokenizer": mine})
    check_backbones(other)  # the decoder comes with none
    give_tokenizer(decoder, "<end>")
    check_backbones(other)  # the same by another name
    give_tokenizer(mine, "<end>", reverse=True)
    with pytest.raises(UserError) as caught:
        check_backbones(build(**backbones, **{"vlm.lm_tokenizer": mine}))
    assert str(caught.value) == (
        f"vlm.lm_tokenizer={mine!r} is not the tokenizer that vlm.lm_model_type={decoder!r} was "
        "trained with: 70 of 70 ids stand for other tokens, 0 for 'w67' instead of '<text>'; leave "
        f"it out, or set vlm.lm_tokenizer={decoder}"
    )


def test_older_layouts_and_what_they_leave_out(backbones: dict[str, str]) -> None:
    def age(values: dict[str, Any]) -> None:
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        del values["num_key_value_heads"], values["head_dim"], values["max_position_embeddings"]

    rewrite(backbones["vlm.lm_model_type"], age)
    rewrite(backbones["vlm.vit_model_type"], lambda v: v.pop("layer_norm_eps"))
    vlm = build(**backbones).vlm
    assert (vlm.lm_re_base, vlm.lm_n_kv_heads, vlm.vit_ln_eps) == (777.0, 5, 1e-6)
    assert vlm.lm_max_position_embeddings == 2048


def test_what_the_user_sets_stands_and_is_checked(backbones: dict[str, str]) -> None:
    larger = build(**backbones, **{"vlm.lm_vocab_size": 80, "vlm.lm_dropout": 0.1}).vlm
    assert (larger.lm_vocab_size, larger.lm_n_blocks, larger.lm_dropout) == (80, 3, 0.1)
    load_backbone_weights(VisionLanguageModel(larger))
    other = build(**backbones, **{"vlm.lm_n_blocks": 2}).vlm
    with pytest.raises(UserError, match=r"vlm.lm_n_blocks=2, but .* set vlm.lm_n_blocks=3"):
        load_backbone_weights(VisionLanguageModel(other))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vlm.lm_model_type": VLMConfig().lm_model_type, "lr_mp": 0.1},
        {"vlm.lm_model_type": "not/here", "vlm.vlm_load_backbone_weights": False},
        {"vlm": {"vit_model_type": "not/here", "vlm_load_backbone_weights": False}},
        {"vlm.vlm_checkpoint_path": "not/here"},
    ],
)
def test_nobody_is_asked_without_need(hub: FakeHub, values: dict[str, Any]) -> None:
    assert start_layers([Layer("file", values)]) == []
    assert hub.requests == []


def test_a_preset_with_all_numbers_asks_nobody(hub: FakeHub) -> None:
    """Nor is torch waited for, and EOS is the tokenizer's."""
    config = load_config(None, "nanovlm-450m", {}, start_layers)
    assert config.vlm.lm_eos_token_id == 2
    assert hub.requests == []
    code = (
        "import sys; from nanovlm import cli; from nanovlm.config.sources import load_config\n"
        "config = load_config(None, 'nanovlm-450m', {}, cli.start_layers)\n"
        "assert config.vlm.lm_eos_token_id == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_numbers_of_backbones_are_those_that_their_files_give(
    backbones: dict[str, str],
) -> None:
    Path(backbones["vlm.vit_model_type"], "preprocessor_config.json").write_text(json.dumps(SAID))
    give_tokenizer(backbones["vlm.lm_model_type"], "<end>")
    for key, read in BACKBONES.items():
        layer = read(key, backbones[key])
        assert {f"vlm.{name}" for name in layer.values["vlm"]} == {*BACKBONE_NUMBERS[key]}


def test_another_decoder_leaves_room_for_extra_tokens(backbones: dict[str, str]) -> None:
    values = {**backbones, "vlm.generation": "v0.2", "vlm.lm_max_length": 512}
    vlm = build(**values).vlm
    assert (vlm.lm_vocab_size, vlm.lm_base_vocab_size) == (71, 70)
    load_backbone_weights(VisionLanguageModel(vlm))
    tiled = {"vlm.generation": "8k", "vlm.max_img_size": 64}
    vlm = build(**values | tiled).vlm
    assert (vlm.lm_vocab_size, vlm.lm_base_vocab_size, vlm.image_token_id) == (136, 70, 70)
    load_backbone_weights(VisionLanguageModel(vlm))
    assert (
        "vlm.generation: must be 'v0.1', 'v0.2' or '8k'"
        in errors_of({**values, "vlm.generation": "v3"})[0]
    )


def test_a_backbone_from_the_hub(hub: FakeHub, backbones: dict[str, str]) -> None:
    hub.add("model", "some/llama", Path(backbones["vlm.lm_model_type"]))
    assert build(**{"vlm.lm_model_type": "some/llama"}).vlm.lm_hidden_dim == 40
    assert not any("model.safetensors" in request for request in hub.requests)


def test_all_that_cannot_be_loaded_is_told(backbones: dict[str, str]) -> None:
    rewrite(backbones["vlm.lm_model_type"], lambda v: v.update(model_type="mixtral"))
    Path(backbones["vlm.vit_model_type"], "config.json").unlink()
    vision, decoder = errors_of(backbones)
    assert vision.endswith("siglip: holds no config.json")
    assert "llama/config.json: model_type='mixtral' cannot be loaded, only 'llama'" in decoder


def test_a_number_that_is_none_names_the_file(backbones: dict[str, str]) -> None:
    rewrite(backbones["vlm.lm_model_type"], lambda v: v.update(num_hidden_layers="3"))
    [message] = errors_of(backbones)
    assert message.startswith(f"{backbones['vlm.lm_model_type']}/config.json: vlm.lm_n_blocks: ")


def test_a_run_that_resumes_has_the_architecture_of_its_checkpoint(tmp_path: Path) -> None:
    text = {"lm_tokenizer": "some/tokenizer", "lm_eos_token_id": 2}
    config = dataclasses.replace(SHAPES, **text)  # type: ignore[arg-type]
    saved = VisionLanguageModel(dataclasses.replace(config, lm_dropout=0.2), seed=1)
    saved.save_pretrained(tmp_path)
    values = {"resume_from_vlm_checkpoint": True, "vlm.vlm_checkpoint_path": str(tmp_path)}
    vlm = build(**values, **{"vlm.lm_max_length": 50}).vlm
    expected = dataclasses.replace(
        config, lm_max_length=50, vlm_checkpoint_path=str(tmp_path), lm_dropout=0.0
    )
    assert vlm == expected
    model = VisionLanguageModel(vlm)
    load_checkpoint(model, str(tmp_path))
    assert torch.equal(model.MP.proj.weight, saved.MP.proj.weight)


def test_both_programs_build_their_configuration_so(
    backbones: dict[str, str], tmp_path: Path
) -> None:
    assert load_config(None, None, backbones, cli.start_layers).vlm.lm_n_blocks == 3
    (tmp_path / "space.yaml").write_text("base: {epochs: 1}\nsearch: {lr_mp: default}\n")
    space = load_space(tmp_path / "space.yaml", backbones, cli.start_layers)
    assert space.base.vlm.lm_n_blocks == 3
    (tmp_path / "resolved.yaml").write_text(space.to_yaml())
    assert load_space(tmp_path / "resolved.yaml").base == space.base


def test_a_configuration_without_other_weights_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from nanovlm import cli; from nanovlm.config.sources import load_config\n"
        "load_config(None, 'digits', {'lr_mp': 1}, cli.start_layers)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
