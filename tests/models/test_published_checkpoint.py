"""Checkpoints of nanoVLM v0.1: every tensor under its published name, read and written again.

The names are those of nanoVLM-222M, all 423 of its file, on small dimensions.
"""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import Layer, build_config
from nanovlm.errors import UserError
from nanovlm.models import checkpoint
from nanovlm.models.model_files import read_tensors
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.start import load_checkpoint, start_layers

HEAD, EMBEDDING = "decoder.head.weight", "decoder.token_embedding.weight"

CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 16, "vit_inter_dim": 24, "vit_patch_size": 8, "vit_img_size": 32,
    "vit_n_heads": 2, "vit_dropout": 0.0, "vit_n_blocks": 12, "vit_ln_eps": 1e-06,
    "vit_cls_flag": False, "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 12, "lm_inter_dim": 20, "lm_rms_eps": 1e-05, "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192, "lm_vocab_size": 30, "lm_n_heads": 3, "lm_n_kv_heads": 1,
    "lm_dropout": 0.0, "lm_n_blocks": 30, "lm_attn_scaling": 1.0, "lm_max_length": 79,
    "lm_use_tokens": False, "lm_tie_weights": True, "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
    "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer", "lm_eos_token_id": 0,
    "mp_pixel_shuffle_factor": 2, "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints/nanoVLM-222M",
}  # fmt: skip
"""The 30 keys of a published config.json."""


def published_names() -> Iterator[tuple[str, list[int]]]:
    """Yield every tensor of the published file with its shape for CONFIG."""
    vision = "vision_encoder"
    yield f"{vision}.patch_embedding.conv.weight", [16, 3, 8, 8]
    yield f"{vision}.patch_embedding.conv.bias", [16]
    yield f"{vision}.patch_embedding.position_embedding", [1, 16, 16]
    for i in range(12):
        for name, shape in (
            ("ln1", [16]),
            ("ln2", [16]),
            ("attn.qkv_proj", [48, 16]),
            ("attn.out_proj", [16, 16]),
            ("mlp.fc1", [24, 16]),
            ("mlp.fc2", [16, 24]),
        ):
            yield f"{vision}.blocks.{i}.{name}.weight", shape
            yield f"{vision}.blocks.{i}.{name}.bias", shape[:1]
    yield f"{vision}.layer_norm.weight", [16]
    yield f"{vision}.layer_norm.bias", [16]
    yield "MP.proj.weight", [12, 64]
    yield "decoder.rotary_embd.inv_freq", [2]
    for i in range(30):
        for name, shape in (
            ("attn.q_proj", [12, 12]),
            ("attn.k_proj", [4, 12]),
            ("attn.v_proj", [4, 12]),
            ("attn.out_proj", [12, 12]),
            ("mlp.gate_proj", [20, 12]),
            ("mlp.up_proj", [20, 12]),
            ("mlp.down_proj", [12, 20]),
            ("norm1", [12]),
            ("norm2", [12]),
        ):
            yield f"decoder.blocks.{i}.{name}.weight", shape
    yield "decoder.norm.weight", [12]
    yield HEAD, [30, 12]  # the token embedding is the same tensor, and not stored


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as nanoVLM v0.1 writes it: safetensors' `save_model` notes the name left out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in published_names()}
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=4))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", EMBEDDING: HEAD})
    return folder


def stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_published_checkpoint_comes_back_as_it_was(published: Path, tmp_path: Path) -> None:
    VisionLanguageModel.from_pretrained(published).save_pretrained(tmp_path / "again")
    before, metadata = stored(published)
    after, metadata_after = stored(tmp_path / "again")
    assert len(before) == 423
    assert after.keys() == before.keys()
    assert [n for n in before if after[n].dtype != torch.float32] == []
    assert [n for n in before if not torch.equal(after[n], before[n])] == []
    assert metadata_after == metadata
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert len(CONFIG) == 30 and values | CONFIG == values


def test_training_starts_from_a_published_checkpoint(published: Path) -> None:
    """Its architecture need not be set, nor that it wants its images as values from 0 to 1."""
    values = {"resume_from_vlm_checkpoint": True, "vlm.vlm_checkpoint_path": str(published)}
    values |= {"vlm.lm_dropout": 0.1, "vlm.lm_max_length": 40}
    config = build_config(Layer("command line", values), below=start_layers).vlm
    assert (config.lm_dropout, config.image_mean) == (0.1, (0.0, 0.0, 0.0))
    model = VisionLanguageModel(config, seed=3)
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    load_checkpoint(model, str(published))
    state = model.state_dict()
    assert [tensor.data_ptr() for tensor in state.values()] == addresses
    tensors, _ = stored(published)
    assert [n for n in tensors if not torch.equal(state[n], tensors[n])] == []
    assert state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()


def test_a_tied_head_stored_twice_must_be_one(published: Path) -> None:
    tensors, _ = stored(published)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[EMBEDDING] = tensors[HEAD].clone()
    save_file(tensors, published / "model.safetensors")
    model = VisionLanguageModel.from_pretrained(published)
    assert torch.equal(model.decoder.token_embedding.weight, tensors[HEAD])
    tensors[EMBEDDING][0] += 1
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(UserError, match=f"lm_tie_weights=true, but {HEAD} is not {EMBEDDING}"):
        VisionLanguageModel.from_pretrained(published)


def private_bytes() -> int:
    """Return the memory of this process that no file backs, without what malloc could give back."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_loading_never_holds_two_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured after each tensor; a copy of all weights is 67 MB, the largest tensor 4 MB."""
    config = VLMConfig(
        vit_hidden_dim=512, vit_n_heads=8, vit_n_blocks=5, vit_img_size=32, lm_hidden_dim=64,
        lm_n_heads=1, lm_n_kv_heads=1, lm_n_blocks=1, lm_inter_dim=64, lm_vocab_size=128,
    )  # fmt: skip
    warm = VisionLanguageModel(config)
    warm.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 60e6
    peaks = []

    def watched(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_tensors(*arguments):
            peaks.append(private_bytes())
            yield name, tensor
            peaks.append(private_bytes())

    monkeypatch.setattr(checkpoint, "read_tensors", watched)
    before = private_bytes()
    load_checkpoint(warm, str(tmp_path))
    assert max(peaks) - before < 0.2 * size
    peaks.clear()
    before = private_bytes()
    VisionLanguageModel.from_pretrained(tmp_path)
    assert 0.8 * size < max(peaks) - before < 1.2 * size
