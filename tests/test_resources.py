"""What a warm worker keeps: the right entry for every configuration, and few of them."""

import dataclasses
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.prepared import prepare_benchmark, prepare_training
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import NUM_KEPT, Resources, benchmark_key, training_data_key
from tests.hub_files import make_llama, make_siglip
from tests.tiny import digits_config

CONFIG = digits_config(batch_size=4)
TILED = dataclasses.replace(
    build_config(preset_layer("digits-tiles")), batch_size=4, data_cutoff_idx=20, val_ratio=0.2
)


def with_vlm(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, vlm=dataclasses.replace(CONFIG.vlm, **changes))


class Recorder:
    """A configuration that remembers which of its values were read."""

    def __init__(self, config: Any, read: list[Any]) -> None:
        self._config, self._read = config, read

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, VLMConfig):
            return Recorder(value, self._read)
        self._read.append((type(self._config).__name__, name))
        return value


@pytest.mark.parametrize("config", [CONFIG, TILED], ids=["v0.1", "8k"])
@pytest.mark.parametrize(
    ("prepare", "key_of", "checked_each_time"),
    [
        (prepare_training, training_data_key, {("TrainConfig", "batch_size")}),
        (prepare_benchmark, benchmark_key, set()),
    ],
)
def test_keys_hold_what_preparing_reads(
    config: TrainConfig,
    prepare: Callable[..., Any],
    key_of: Callable[..., Any],
    checked_each_time: set[Any],
) -> None:
    prepared, keyed = list[Any](), list[Any]()
    prepare(Recorder(config, prepared), model_tokenizer(config.vlm))
    key_of(Recorder(config, keyed))
    by_generation = {("VLMConfig", "vlm_extra_tokens")}
    assert set(prepared) - checked_each_time - by_generation == set(keyed)


def test_training_data_is_kept_for_its_key_alone() -> None:
    resources = Resources("cpu")
    train_samples, val_samples = resources.training_data(CONFIG)
    again = dataclasses.replace(CONFIG, lr_mp=1.0, seed=5, batch_size=8)
    assert resources.training_data(again)[0] is train_samples
    fewer, _ = resources.training_data(dataclasses.replace(CONFIG, data_cutoff_idx=10))
    assert len(fewer) < len(train_samples)
    more_val = resources.training_data(dataclasses.replace(CONFIG, val_ratio=0.5))[1]
    assert len(more_val) > len(val_samples)


def test_the_parts_of_the_benchmark_share_what_is_prepared() -> None:
    resources = Resources("cpu")
    parts = {
        part: resources.benchmark(
            dataclasses.replace(CONFIG, mmstar_holdout=0.25, mmstar_part=part)
        )
        for part in ("search", "holdout", "all")
    }
    whole = parts["all"]
    assert whole is resources.benchmark(CONFIG)
    assert len(parts["holdout"]) == len(whole) / 4
    assert sorted(parts["search"].indices + parts["holdout"].indices) == list(whole.indices)
    assert all(part.images is whole.images for part in parts.values())
    assert len(resources._benchmarks._values) == 1
    other_seed = dataclasses.replace(CONFIG, mmstar_holdout=0.25, mmstar_part="holdout", seed=9)
    assert resources.benchmark(other_seed).indices == parts["holdout"].indices


def test_the_batch_size_is_checked_for_every_trial() -> None:
    resources = Resources("cpu")
    resources.training_data(CONFIG)
    with pytest.raises(UserError, match="batch_size"):
        resources.training_data(dataclasses.replace(CONFIG, batch_size=10_000))


def test_a_question_that_the_model_has_no_positions_for() -> None:
    resources = Resources("cpu")
    longest = int(resources.benchmark(CONFIG).offsets.diff().max())
    needed = CONFIG.vlm.num_image_tokens + longest + 5  # of an answer are at least so many read
    room = {"lm_max_length": 8, "lm_max_position_embeddings": needed}
    resources.benchmark(with_vlm(**room))
    with pytest.raises(
        UserError, match=rf"={needed - 1}: the question with index \d+ .* {needed} p"
    ):
        resources.benchmark(with_vlm(**room | {"lm_max_position_embeddings": needed - 1}))


def test_a_failure_is_not_kept() -> None:
    resources = Resources("cpu")
    for _ in range(2):
        with pytest.raises(UserError, match="/no/such/folder"):
            resources.benchmark(dataclasses.replace(CONFIG, test_dataset_path="/no/such/folder"))


def test_few_entries_are_kept() -> None:
    resources = Resources("cpu")
    first = resources.model(CONFIG)
    for dropout in (0.1, 0.2, 0.3):
        resources.model(with_vlm(lm_dropout=dropout))
        assert len(resources._models._values) <= NUM_KEPT
    assert resources.model(CONFIG) is not first


def test_a_dropped_model_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovlm.resources.find_compile_obstacle", lambda _: None)  # seconds
    resources = Resources("cpu")
    weights = weakref.ref(resources.model(dataclasses.replace(CONFIG, compile=True)).MP.proj.weight)
    for dropout in (0.1, 0.2):
        resources.model(with_vlm(lm_dropout=dropout))
    assert weights() is None


def test_the_last_used_entries_are_kept() -> None:
    resources = Resources("cpu")
    first = resources.model(CONFIG)
    for dropout in (0.1, 0.2, 0.3):
        resources.model(with_vlm(lm_dropout=dropout))
        assert resources.model(CONFIG) is first


def test_a_model_is_reset_in_place() -> None:
    resources = Resources("cpu")
    model = resources.model(CONFIG)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.fill_(7.0)
    assert resources.model(CONFIG) is model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, initial[name]), name


def test_models_of_other_configurations_are_others() -> None:
    resources = Resources("cpu")
    model = resources.model(CONFIG)
    projector = model.MP.proj.weight.clone()
    assert resources.model(with_vlm(lm_dropout=0.1)) is not model
    assert resources.model(dataclasses.replace(CONFIG, seed=1)) is model
    assert not torch.equal(model.MP.proj.weight, projector)


def test_what_fits_into_the_memory_is_known_for_every_probability_of_dropout() -> None:
    resources = Resources("cpu")
    found = resources.micro_batch_size(with_vlm(lm_dropout=0.1))
    found.restore(3)
    assert resources.micro_batch_size(with_vlm(lm_dropout=0.2)).limit == 3
    assert resources.micro_batch_size(with_vlm(lm_dropout=0.0)) is not found
    assert resources.micro_batch_size(with_vlm(lm_dropout=0.2, lm_n_blocks=2)) is not found


# ------------------------------------------------------------------ weights that files hold


@pytest.fixture
def pretrained(tmp_path: Path) -> TrainConfig:
    """A configuration with backbones in two folders."""
    config = with_vlm(
        vlm_load_backbone_weights=True,
        lm_vocab_size=100,
        vit_model_type=str(tmp_path / "siglip"),
        lm_model_type=str(tmp_path / "llama"),
    )
    make_siglip(config.vlm)
    make_llama(config.vlm)
    return dataclasses.replace(config, vlm=dataclasses.replace(config.vlm, lm_vocab_size=128))


@pytest.fixture
def resumed(tmp_path: Path) -> TrainConfig:
    """A configuration that resumes from a saved model, with rotary frequencies of its own."""
    folder = tmp_path / "model"
    VisionLanguageModel(CONFIG.vlm, seed=9).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["decoder.rotary_embd.inv_freq"] *= 2
    save_file(weights, folder / "model.safetensors")
    config = with_vlm(vlm_checkpoint_path=str(folder))
    return dataclasses.replace(config, resume_from_vlm_checkpoint=True)


def weights_of(model: VisionLanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(model: VisionLanguageModel, weights: dict[str, Tensor]) -> list[str]:
    now = model.state_dict()
    return [name for name in weights if not torch.equal(now[name], weights[name])]


def spoil(model: VisionLanguageModel) -> None:
    for tensor in model.state_dict().values():
        tensor.fill_(7.0)


@pytest.mark.parametrize("start", ["pretrained", "resumed"])
def test_files_are_read_once(request: pytest.FixtureRequest, start: str, tmp_path: Path) -> None:
    config = request.getfixturevalue(start)
    resources = Resources("cpu")
    model = resources.model(config)
    first = weights_of(model)
    assert differing(resources.model(with_vlm()), first)  # other weights than random ones
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    shutil.rmtree(tmp_path)
    for _ in range(2):  # what a trial does to its model reaches no later one
        spoil(model)
        assert resources.model(config) is model
        assert differing(model, first) == []
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    other = dataclasses.replace(
        config, vlm=dataclasses.replace(config.vlm, lm_dropout=0.1, lm_max_length=64)
    )
    assert differing(resources.model(other), first) == []
    assert resources.model(other) is not model


def test_with_pretrained_backbones_the_seed_decides_the_projector(pretrained: TrainConfig) -> None:
    resources = Resources("cpu")
    first = weights_of(resources.model(pretrained))
    seeded = dataclasses.replace(pretrained, seed=3)
    model = resources.model(seeded)
    assert differing(model, first) == ["MP.proj.weight"]
    assert differing(Resources("cpu").model(seeded), weights_of(model)) == []


@pytest.mark.parametrize("change", [{"lm_n_blocks": 2}, {"lm_re_base": 5.0}])
def test_kept_weights_are_for_their_architecture_alone(
    pretrained: TrainConfig, change: dict[str, Any]
) -> None:
    resources = Resources("cpu")
    resources.model(pretrained)
    unfit = dataclasses.replace(pretrained, vlm=dataclasses.replace(pretrained.vlm, **change))
    with pytest.raises(UserError, match=f"vlm.{next(iter(change))}="):
        resources.model(unfit)


def test_kept_weights_are_for_their_files_alone(resumed: TrainConfig, tmp_path: Path) -> None:
    resources = Resources("cpu")
    first = weights_of(resources.model(resumed))
    for seed in range(NUM_KEPT + 1):
        folder = tmp_path / str(seed)
        saved = VisionLanguageModel(resumed.vlm, seed=seed)
        saved.save_pretrained(folder)
        vlm = dataclasses.replace(resumed.vlm, vlm_checkpoint_path=str(folder))
        model = resources.model(dataclasses.replace(resumed, vlm=vlm))
        assert differing(model, saved.state_dict()) == []
        assert len(resources._weights._values) <= NUM_KEPT
    assert differing(resources.model(resumed), first) == []


def test_a_start_leaves_nothing_to_the_next_of_another_kind(
    pretrained: TrainConfig, resumed: TrainConfig
) -> None:
    """One model serves all three; the saved one brings rotary frequencies of its own."""
    path = resumed.vlm.vlm_checkpoint_path
    pretrained = dataclasses.replace(
        pretrained, vlm=dataclasses.replace(pretrained.vlm, vlm_checkpoint_path=path)
    )
    resumed = dataclasses.replace(resumed, vlm=pretrained.vlm)
    resources = Resources("cpu")
    model = resources.model(resumed)
    assert resources.model(pretrained) is model
    assert differing(Resources("cpu").model(pretrained), weights_of(model)) == []


def test_a_trials_own_checkpoint_is_read_each_time(tmp_path: Path) -> None:
    resources = Resources("cpu")
    for seed in (1, 2):
        saved = VisionLanguageModel(CONFIG.vlm, seed=seed)
        saved.save_pretrained(tmp_path)
        assert differing(resources.model(CONFIG, str(tmp_path)), saved.state_dict()) == []


# ------------------------------------------------------------------ what goes otherwise


def test_a_note_is_of_its_trial_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    resources = Resources("cpu")
    with caplog.at_level(logging.WARNING, "nanovlm"):
        for _ in range(2):
            resources.start_trial()
            assert not resources.notes
            resources.note("one")
            resources.note("two")
            resources.note("one")
            assert resources.notes == ("one", "two")
    assert caplog.messages == ["one", "two"]


def test_without_a_compiler_the_model_is_the_uncompiled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovlm.resources.find_compile_obstacle", lambda _: "no compiler here")
    resources = Resources("cpu")
    plain = resources.model(CONFIG)
    assert not resources.notes
    assert resources.model(dataclasses.replace(CONFIG, compile=True)) is plain
    assert resources.notes == ("compile=true: no compiler here; the model runs uncompiled",)


def test_a_gpu_without_bfloat16_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    resources = Resources("cuda")
    resources.start_trial()
    assert resources.notes == ("Tesla V100 has no bfloat16: computing in float32",)
