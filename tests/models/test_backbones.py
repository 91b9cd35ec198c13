"""Pretrained backbones: folders as transformers writes them give what transformers computes."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from nanovlm import downloads
from nanovlm.config.schema import VLMConfig
from nanovlm.errors import UserError
from nanovlm.models.packing import pack
from nanovlm.models.pretrained import check_backbone_weights, load_backbone_weights
from nanovlm.models.vision_language_model import VisionLanguageModel
from tests.hub_files import Randomize, make_llama, make_siglip, make_two_towers

VISION_SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"vit_hidden_dim": 48, "vit_n_heads": 3, "vit_n_blocks": 1, "vit_inter_dim": 80},
    {"vit_img_size": 48, "vit_patch_size": 12, "vit_ln_eps": 1e-3},
    {"vit_n_blocks": 3, "vit_n_heads": 8, "vit_img_size": 16, "vit_patch_size": 4},
)
DECODER_SHAPES: tuple[dict[str, Any], ...] = (
    {"lm_tie_weights": True},
    {"lm_n_kv_heads": 4, "lm_re_base": 500.0},
    {
        "lm_hidden_dim": 48,
        "lm_n_heads": 3,
        "lm_n_kv_heads": 1,
        "lm_n_blocks": 3,
        "lm_vocab_size": 7,
    },
    {"lm_inter_dim": 40, "lm_n_kv_heads": 4, "lm_rms_eps": 1e-2, "lm_tie_weights": True},
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def config(tiny: VLMConfig, tmp_path: Path) -> VLMConfig:
    """The tiny model, with its backbones in two folders that are still to be made."""
    siglip, llama = str(tmp_path / "siglip"), str(tmp_path / "llama")
    return dataclasses.replace(tiny, vit_model_type=siglip, lm_model_type=llama)


@pytest.fixture
def folders(config: VLMConfig, randomize: Randomize) -> VLMConfig:
    make_two_towers(config, randomize)
    make_llama(config, randomize)
    return config


def loaded(config: VLMConfig) -> VisionLanguageModel:
    model = VisionLanguageModel(config, seed=5).eval()
    load_backbone_weights(model)
    return model


def errors_of(config: VLMConfig) -> tuple[str, ...]:
    model = VisionLanguageModel(config, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_backbone_weights(model)
    with pytest.raises(UserError) as checked:
        check_backbone_weights(config)
    assert checked.value.messages == caught.value.messages
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return caught.value.messages


def rewrite_config(folder: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(folder, "config.json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite_weights(folder: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = Path(folder, "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


@torch.no_grad()
def assert_same_vision(model: VisionLanguageModel, theirs: nn.Module) -> None:
    size = model.config.vit_img_size
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixel_values=image).last_hidden_state
    torch.testing.assert_close(model.vision_encoder(image), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def assert_same_logits(model: VisionLanguageModel, theirs: LlamaForCausalLM) -> None:
    ids = torch.arange(24).reshape(2, 12) % theirs.config.vocab_size
    decoder = model.decoder
    packing = pack(torch.tensor([12, 12]), 0, 25)
    hidden = decoder(decoder.token_embedding(F.pad(ids.flatten(), (0, 1))), packing)[:-1]
    ours = decoder.head(hidden).unflatten(0, (2, 12))[..., : theirs.config.vocab_size]
    torch.testing.assert_close(ours, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("make_vision", [make_siglip, make_two_towers])
@pytest.mark.parametrize(
    "changes", [v | d for v, d in zip(VISION_SHAPES, DECODER_SHAPES, strict=True)]
)
def test_outputs_equal_those_of_transformers(
    config: VLMConfig,
    randomize: Randomize,
    changes: dict[str, Any],
    make_vision: Callable[..., nn.Module],
    max_shard_size: str,
) -> None:
    config = dataclasses.replace(config, **changes)
    vision = make_vision(config, randomize, max_shard_size=max_shard_size)
    llama = make_llama(config, randomize, max_shard_size=max_shard_size)
    sharded = {
        folder.parent.name for folder in Path(config.vit_model_type).parent.glob("*/*index*")
    }
    assert sharded == (set() if max_shard_size == "1GB" else {"siglip", "llama"})
    model = loaded(config)
    assert_same_vision(model, vision)
    assert_same_logits(model, llama)


def test_what_fits_passes_the_check(folders: VLMConfig) -> None:
    check_backbone_weights(folders)


def test_loading_is_in_place_and_leaves_the_projector(folders: VLMConfig) -> None:
    model = VisionLanguageModel(folders, seed=5)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    load_backbone_weights(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    fresh = VisionLanguageModel(folders, seed=5)
    assert torch.equal(model.MP.proj.weight, fresh.MP.proj.weight)
    assert torch.equal(model.decoder.rotary_embd.inv_freq, fresh.decoder.rotary_embd.inv_freq)


@pytest.mark.gpu
def test_a_model_on_a_gpu(folders: VLMConfig) -> None:
    with torch.device("cuda"):
        model = VisionLanguageModel(folders, seed=5)
    load_backbone_weights(model)
    expected = loaded(folders).state_dict()
    for name in expected.keys() - {"MP.proj.weight", "decoder.rotary_embd.inv_freq"}:
        assert torch.equal(model.state_dict()[name].cpu(), expected[name])


def test_half_precision_and_stored_frequencies(config: VLMConfig, randomize: Randomize) -> None:
    make_siglip(config, randomize)
    make_llama(config, randomize).bfloat16().save_pretrained(config.lm_model_type)
    llama = LlamaForCausalLM.from_pretrained(config.lm_model_type, dtype=torch.float32).eval()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite_weights(config.lm_model_type, lambda weights: weights.update(frequencies))
    assert_same_logits(loaded(config), llama)


def test_the_older_layout_of_theta(config: VLMConfig, randomize: Randomize) -> None:
    config = dataclasses.replace(config, lm_re_base=700.0)
    make_siglip(config, randomize)
    llama = make_llama(config, randomize)

    def age(values: dict[str, Any]) -> None:
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        values["rope_scaling"] = None
        del values["head_dim"]

    rewrite_config(config.lm_model_type, age)
    assert_same_logits(loaded(config), llama)
    [message] = errors_of(dataclasses.replace(config, lm_re_base=100_000.0))
    assert "vlm.lm_re_base=100000.0" in message and "rope_theta=700.0: set" in message


def test_an_older_vision_tower_alone(folders: VLMConfig) -> None:
    """Its config is flat, its names have the prefix of the two-tower file."""
    expected = loaded(folders).state_dict()
    rewrite_config(folders.vit_model_type, lambda v: v.update(v.pop("vision_config")))
    state = loaded(folders).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_numbers_that_a_config_leaves_out_are_those_of_transformers(folders: VLMConfig) -> None:
    """Published SigLIP configs hold only what differs from the defaults."""
    rewrite_config(folders.vit_model_type, lambda v: v.update(vision_config={}))
    messages = errors_of(folders)
    assert len(messages) == 6
    assert any("vlm.vit_n_blocks=2, but" in m and "set vlm.vit_n_blocks=12" in m for m in messages)


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_gets_the_mean(
    config: VLMConfig, randomize: Randomize, tied: bool
) -> None:
    config = dataclasses.replace(config, lm_tie_weights=tied)
    make_siglip(config, randomize)
    llama = make_llama(config, randomize)
    model = loaded(dataclasses.replace(config, lm_vocab_size=53))
    assert_same_logits(model, llama)
    state = llama.state_dict()
    for ours, theirs in (
        (model.decoder.token_embedding.weight, state[EMBEDDING]),
        (model.decoder.head.weight, state[HEAD]),
    ):
        assert torch.equal(ours[:50], theirs)
        mean = theirs.mean(dim=0)
        torch.testing.assert_close(ours[50:], mean.expand(3, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        (True, {"generation": "v0.2", "lm_vocab_size": 52}),
        (False, {"generation": "v0.2", "lm_vocab_size": 52}),
        (True, {"generation": "8k", "lm_vocab_size": 51 + 66, "max_img_size": 64}),
    ],
)
def test_extra_tokens_are_drawn_the_same_for_all_seeds(
    config: VLMConfig, randomize: Randomize, tied: bool, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, lm_tie_weights=tied)
    make_siglip(config, randomize)
    llama = make_llama(config, randomize)
    extended = dataclasses.replace(config, **changes)
    model, other = VisionLanguageModel(extended, seed=5), VisionLanguageModel(extended, seed=6)
    load_backbone_weights(model)
    load_backbone_weights(other)
    assert_same_logits(model, llama)
    weights = model.decoder.token_embedding.weight, model.decoder.head.weight
    assert torch.equal(weights[0], weights[1]) == tied
    for weight, again, key in (
        (weights[0], other.decoder.token_embedding.weight, EMBEDDING),
        (weights[1], other.decoder.head.weight, HEAD),
    ):
        mean = llama.state_dict()[key].mean(dim=0)
        torch.testing.assert_close(weight[50], mean, atol=1e-6, rtol=0)
        assert torch.equal(weight[51:], again[51:])
        assert 0.01 < weight[51:].std().item() < 0.03


def test_extra_tokens_need_room_beyond_the_decoders(folders: VLMConfig) -> None:
    [message] = errors_of(dataclasses.replace(folders, generation="v0.2", lm_vocab_size=50))
    assert message.startswith("vlm.lm_vocab_size=50 less 1 extra token is smaller than vocab_size=")
    assert message.endswith("set vlm.lm_vocab_size to 51 or more")


def test_a_smaller_vocabulary_is_an_error(folders: VLMConfig) -> None:
    [message] = errors_of(dataclasses.replace(folders, lm_vocab_size=49))
    assert "vlm.lm_vocab_size=49" in message and "50 or more" in message


def test_all_numbers_that_differ_are_listed(folders: VLMConfig) -> None:
    changes: dict[str, Any] = {
        "vit_hidden_dim": 64,
        "vit_inter_dim": 100,
        "vit_n_blocks": 1,
        "vit_n_heads": 4,
        "vit_ln_eps": 1e-5,
        "vit_patch_size": 16,
        "vit_img_size": 64,
        "lm_hidden_dim": 64,
        "lm_inter_dim": 32,
        "lm_n_blocks": 1,
        "lm_n_heads": 2,
        "lm_n_kv_heads": 1,
        "lm_rms_eps": 1e-6,
        "lm_re_base": 10.0,
        "lm_tie_weights": True,
    }
    messages = errors_of(dataclasses.replace(folders, **changes))
    assert len(messages) == len(changes)
    for (key, ours), message in zip(sorted(changes.items()), sorted(messages), strict=True):
        theirs = 128 if key == "vit_inter_dim" else getattr(folders, key)
        assert message.startswith(f"vlm.{key}={ours!r}, but ")
        assert message.endswith(f": set vlm.{key}={theirs!r}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mixtral"),
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("rope_parameters", {"rope_theta": 1e5, "rope_type": "llama3", "factor": 8.0}),
    ],
)
def test_what_our_decoder_cannot_compute(folders: VLMConfig, key: str, value: Any) -> None:
    rewrite_config(folders.lm_model_type, lambda values: values.update({key: value}))
    [message] = errors_of(folders)
    assert "llama/config.json" in message and "cannot be loaded, only" in message


def test_a_tower_that_is_no_siglip(folders: VLMConfig) -> None:
    other = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    rewrite_config(folders.vit_model_type, lambda values: values["vision_config"].update(other))
    assert len(errors_of(folders)) == 2


def test_tensors_that_do_not_fit_are_all_listed(folders: VLMConfig) -> None:
    def damage_vision(weights: dict[str, Tensor]) -> None:
        del weights["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
        weights["vision_model.post_layernorm.weight"] = torch.zeros(3)
        weights["vision_model.extra"] = torch.zeros(1)

    def damage_decoder(weights: dict[str, Tensor]) -> None:
        del weights[HEAD]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)

    rewrite_weights(folders.vit_model_type, damage_vision)
    rewrite_weights(folders.lm_model_type, damage_decoder)
    messages = errors_of(folders)
    for message, problem in zip(
        messages,
        (
            "missing: vision_model.encoder.layers.1.self_attn.k_proj.bias",
            "unknown: vision_model.extra",
            "of another shape: vision_model.post_layernorm.weight [3] instead of [32]",
            "missing: lm_head.weight",
            "unknown: model.layers.0.self_attn.q_proj.bias",
        ),
        strict=True,
    ):
        assert message.endswith(f"tensors {problem}")


def test_a_stored_copy_of_a_tied_head_must_be_one(config: VLMConfig, randomize: Randomize) -> None:
    config = dataclasses.replace(config, lm_tie_weights=True)
    make_siglip(config, randomize)
    llama = make_llama(config, randomize)
    rewrite_weights(config.lm_model_type, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    assert_same_logits(loaded(config), llama)
    rewrite_weights(config.lm_model_type, lambda w: w[HEAD].zero_())
    [message] = errors_of(config)
    assert "lm_head.weight is not model.embed_tokens.weight" in message


def test_files_that_are_missing_or_broken(config: VLMConfig, randomize: Randomize) -> None:
    make_siglip(config, randomize, max_shard_size="20KB")
    make_llama(config, randomize)
    index = Path(config.vit_model_type, "model.safetensors.index.json")
    shard = sorted(index.parent.glob("model-*"))[1]
    shard.write_bytes(b"none")
    assert errors_of(config)[0].startswith(f"{shard}: is not a safetensors file")
    shard.unlink()
    assert f"holds no {shard.name}, which" in errors_of(config)[0]
    index.write_text("{}")
    assert "weight_map" in errors_of(config)[0]
    index.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in errors_of(config)[0]
    (index.parent / "config.json").unlink()
    assert errors_of(config)[0].endswith("siglip: holds no config.json")


def test_the_index_says_which_shard_a_tensor_is_read_from(
    config: VLMConfig, randomize: Randomize
) -> None:
    make_siglip(config, randomize)
    make_llama(config, randomize, max_shard_size="20KB")
    index = Path(config.lm_model_type, "model.safetensors.index.json")
    content = json.loads(index.read_text())
    places: dict[str, str] = content["weight_map"]
    fresh = loaded(config).decoder.token_embedding.weight.clone()
    *_, last = sorted(set(places.values()) - {places[EMBEDDING]})
    shard = index.with_name(last)
    stale = load_file(shard) | {EMBEDDING: torch.zeros_like(fresh), "old": torch.zeros(1)}
    save_file(stale, shard)
    assert torch.equal(loaded(config).decoder.token_embedding.weight, fresh)

    places["model.norm.weight"] = places[EMBEDDING]
    index.write_text(json.dumps(content))
    [message] = errors_of(config)
    expected = index.with_name(places[EMBEDDING])
    assert message == (
        f"{expected}: holds no model.norm.weight, which model.safetensors.index.json says is in it"
    )
    for elsewhere in ("../other.safetensors", 3):
        content["weight_map"][EMBEDDING] = elsewhere
        index.write_text(json.dumps(content))
        assert f"must name files beside it, got {elsewhere!r}" in errors_of(config)[0]


def test_a_hub_id_is_fetched_with_what_is_needed(
    folders: VLMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, repo_type: str, revision: None, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[0]))
        return {"a/siglip": folders.vit_model_type, "a/llama": folders.lm_model_type}[name]

    monkeypatch.setattr(downloads, "snapshot_download", download)
    downloads._downloaded.cache_clear()
    hub = dataclasses.replace(folders, vit_model_type="a/siglip", lm_model_type="a/llama")
    expected = loaded(folders).state_dict()
    for _ in range(2):  # the second time nothing is asked
        state = loaded(hub).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    files = ("config.json", "model.safetensors")
    assert asked == [(name, file) for file in files for name in ("a/siglip", "a/llama")]


def test_no_hub_and_no_cache_is_one_message_at_once(
    config: VLMConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub = dataclasses.replace(config, vit_model_type="google/siglip", lm_model_type="some/llama")
    start = time.monotonic()
    [message] = errors_of(hub)
    assert time.monotonic() - start < 5
    for part in (
        "vlm.vit_model_type='google/siglip'",
        "config.json",
        "HF_HOME",
        "HF_HUB_OFFLINE=1",
        "search_spaces/digits.yaml",
    ):
        assert part in message


def test_a_cache_that_holds_only_the_config_says_so(
    folders: VLMConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    repository, commit = tmp_path / "cache" / "models--some--llama", 40 * "0"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    cached = repository / "snapshots" / commit
    cached.mkdir(parents=True)
    shutil.copy(Path(folders.lm_model_type, "config.json"), cached)
    [message] = errors_of(dataclasses.replace(folders, lm_model_type="some/llama"))
    assert "model.safetensors" in message and "holds none of these files" in message
    assert "vlm.lm_model_type='some/llama'" in message and "HF_HOME" in message
