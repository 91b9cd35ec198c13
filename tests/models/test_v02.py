"""Models of nanoVLM v0.2 (450M): their files, read and written again, and what they compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models

from nanovlm.config.generations import V8K
from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer, build_config, preset_layer
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.start import load_checkpoint, start_layers
from tests.models.v02_files import CONFIG, IMAGE_TOKEN, Parts, joined_logits, make_parts
from tests.models.v02_files import write_checkpoint as write

TILED = {
    "lm_chat_template": "{% for message in messages %}...", "max_img_size": 2048,
    "resize_to_max_side_len": True, "extra_token_amount": 65, "lm_vocab_size": 49217,
    "lm_eos_token_id": None,
}  # fmt: skip
"""What config.json of an 8k model has otherwise; None takes a key out."""


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture
def published(tmp_path: Path, parts: Parts) -> Path:
    return write(tmp_path / "published", parts)


def errors_of(folder: Path, **overrides: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        VisionLanguageModel.from_pretrained(folder, **overrides)
    return caught.value.messages


def text_and_image() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(IMAGE_TOKEN, (2, 7), generator=generator)
    return text, torch.rand(2, 3, 32, 32, generator=generator)


def test_the_preset_is_nanovlm_450m() -> None:
    config = build_config(preset_layer("nanovlm-450m")).vlm
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == 450_614_400
    assert model.decoder.head.weight.shape == (49_153, 960)
    assert (config.num_image_tokens, config.max_text_length) == (64, 448)
    assert config.lm_base_vocab_size == 49_152


def test_logits_are_those_of_transformers_with_placeholders(published: Path, parts: Parts) -> None:
    model = VisionLanguageModel.from_pretrained(published).eval()
    text, image = text_and_image()
    with torch.no_grad():
        ours = model(text, image)[0]
    assert ours.shape == (2, 7, 31)
    torch.testing.assert_close(ours, joined_logits(parts, text, image), atol=1e-5, rtol=0)


def test_greedy_answers_are_those_of_transformers(published: Path, parts: Parts) -> None:
    model = VisionLanguageModel.from_pretrained(published).eval()
    text, image = text_and_image()
    ours = model.generate(text, image, max_new_tokens=6)
    for _ in range(6):
        text = torch.cat((text, joined_logits(parts, text, image)[:, -1:].argmax(-1)), dim=1)
    theirs = text[:, 7:].tolist()
    eos = [row.index(2) if 2 in row else 6 for row in theirs]  # everything after EOS is EOS
    expected = [row[:end] + [2] * (6 - end) for row, end in zip(theirs, eos, strict=True)]
    assert ours.tolist() == [row[: ours.shape[1]] for row in expected]


def test_a_published_checkpoint_comes_back_as_nanovlm_reads_it(
    published: Path, tmp_path: Path
) -> None:
    """nanoVLM passes the file to a dataclass, which refuses keys that are not its own."""
    VisionLanguageModel.from_pretrained(published).save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values == {key: value for key, value in CONFIG.items() if key != "lm_eos_token_id"}
    before, after = (load_file(f / "model.safetensors") for f in (published, tmp_path / "again"))
    assert after.keys() == before.keys() and len(before) == 60
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_other_images_than_the_published_ones_are_written(published: Path, tmp_path: Path) -> None:
    model = VisionLanguageModel.from_pretrained(published, image_mean=(0.5, 0.5, 0.5))
    model.save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values.keys() - CONFIG.keys() == {"image_mean", "image_std", "image_resampling"}
    assert VisionLanguageModel.from_pretrained(tmp_path / "again").config == model.config


def test_what_a_file_leaves_out_is_as_in_the_preset(tmp_path: Path, parts: Parts) -> None:
    folder = write(tmp_path, parts, lm_max_length=None, lm_tokenizer=None, lm_model_type=None)
    config = VisionLanguageModel.from_pretrained(folder).config
    assert config.lm_max_length == 512
    assert config.lm_tokenizer == config.lm_model_type == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert (config.generation, config.image_mean) == ("v0.2", (0.0, 0.0, 0.0))


def test_eos_is_the_tokenizers_and_not_the_files(
    published: Path, tmp_path: Path, parts: Parts
) -> None:
    assert VisionLanguageModel.from_pretrained(published).config.lm_eos_token_id == 2
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    mine = tmp_path / "tokenizer"
    mine.mkdir()
    tokenizer.save(str(mine / "tokenizer.json"))
    folder = write(tmp_path / "mine", parts, lm_tokenizer=str(mine), lm_eos_token_id=1)
    [message] = errors_of(folder)
    assert message.startswith(f"vlm.lm_tokenizer='{mine}': ") and "eos_token" in message
    assert VisionLanguageModel.from_pretrained(folder, lm_eos_token_id=1).config.lm_vocab_size == 31
    (mine / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert VisionLanguageModel.from_pretrained(folder).config.lm_eos_token_id == 2


def test_a_run_starts_from_it(published: Path) -> None:
    """Not only the architecture: `lm_max_length` includes the image, as its default does not."""
    values = {"resume_from_vlm_checkpoint": True, "vlm.vlm_checkpoint_path": str(published)}
    config = build_config(Layer("command line", values), below=start_layers).vlm
    assert (config.generation, config.lm_eos_token_id) == ("v0.2", 2)
    assert (config.lm_max_length, config.max_text_length) == (512, 508)
    model = VisionLanguageModel(config, seed=3)
    load_checkpoint(model, str(published))
    stored = load_file(published / "model.safetensors")
    assert [n for n in stored if not torch.equal(model.state_dict()[n], stored[n])] == []


def test_placeholders_in_the_text_are_refused(published: Path) -> None:
    """Of callers who know nanoVLM's own code, where the text holds them."""
    model = VisionLanguageModel.from_pretrained(published)
    text, image = text_and_image()
    text[0, 0] = IMAGE_TOKEN
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="input_ids must be below 30"):
            call(text, image)
    model(text, image, torch.arange(7) > 0 * text)  # it is padding there


def test_a_variant_of_the_8k_generation_is_told_in_one_message(
    tmp_path: Path, parts: Parts
) -> None:
    """As nanoVLM's own models were before they had a global tile."""
    tokens = {key: token for key, token in V8K.extra_tokens.items() if "global" not in key}
    [message] = errors_of(write(tmp_path, parts, **TILED, vlm_extra_tokens=tokens))
    assert message == (
        f"{tmp_path / 'config.json'}: looks like a variant of nanoVLM 8k (nanoVLM-460M-8k, "
        "nanoVLM-230M-8k), which cannot be loaded: it must have vlm_extra_tokens={'image_token': "
        "'<|image|>', 'global_image_token': '<|global_image|>', 'r1c1': '<row_1_col_1>', ...} (66 "
        "tokens) in this order, got {'image_token': '<|image|>', 'r1c1': '<row_1_col_1>', 'r1c2': "
        "'<row_1_col_2>', ...} (65 tokens). The generations that can: v0.1 (nanoVLM-222M), v0.2 "
        "(nanoVLM-450M), 8k (nanoVLM-460M-8k, nanoVLM-230M-8k)"
    )


def test_other_extra_tokens_are_told_in_one_message(tmp_path: Path, parts: Parts) -> None:
    tokens = {"image_token": "<|image|>", "boi_token": "<|image_start|>"}
    [message] = errors_of(write(tmp_path, parts, vlm_extra_tokens=tokens, extra_token_amount=2))
    assert "looks like a variant of nanoVLM v0.2" in message
    assert f"must have vlm_extra_tokens={CONFIG['vlm_extra_tokens']} in this order" in message
    assert f"got {tokens}" in message


def test_unknown_keys_are_told_in_one_message(tmp_path: Path, parts: Parts) -> None:
    changes = {"vit_architecture": "dinov3", "lm_hiden_dim": 12, "generation": "v0.2"}
    [message] = errors_of(write(tmp_path, parts, **changes))
    assert message.startswith(
        f"{tmp_path / 'config.json'}: looks like a model of nanoVLM v0.2 (nanoVLM-450M), which has "
        "no such keys: 'vit_architecture'"
    )
    assert "'lm_hiden_dim' (did you mean 'lm_hidden_dim'?), 'generation'" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mp_image_token_length", 49, 4),
        ("extra_token_amount", 66, 1),
        ("lm_base_vocab_size", 31, 30),
    ],
)
def test_a_value_that_contradicts_the_others_is_told_in_one_message(
    tmp_path: Path, parts: Parts, key: str, value: int, expected: int
) -> None:
    [message] = errors_of(write(tmp_path, parts, **{key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: vlm.{key}: must be {expected}, ")
    assert message.endswith(f", got {value}")


def test_derived_keys_of_v01_are_checked_too() -> None:
    values = {"vlm": {"mp_image_token_length": 49, "vlm_extra_tokens": {}}}
    assert build_config(Layer("file", values)).vlm == VLMConfig()
    with pytest.raises(UserError, match=r"file: vlm.extra_token_amount: must be 0, .* got 1"):
        build_config(Layer("file", {"vlm.extra_token_amount": 1}))


def v02(**changes: Any) -> VLMConfig:
    return VLMConfig(generation="v0.2", lm_vocab_size=49_153, **changes)


def test_the_length_includes_the_image() -> None:
    assert v02(lm_max_length=512).max_text_length == 463
    assert v02(lm_max_length=512, mp_pixel_shuffle_factor=1).max_text_length == 316
    with pytest.raises(ValueError, match="lm_max_length=49 leaves no room for text: in generation"):
        v02(lm_max_length=49)
    with pytest.raises(ValueError, match="lm_max_length=8193 exceeds lm_max_position_embeddings"):
        v02(lm_max_length=8193)
    v02(lm_max_length=8192)


def test_the_image_token_cannot_end_a_text() -> None:
    with pytest.raises(ValueError, match="below lm_vocab_size less 1 extra token, got 49152"):
        v02(lm_eos_token_id=49_152)
