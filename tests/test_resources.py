"""What a warm worker keeps: the right entry for every configuration, and few of them."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.data.prepared import prepare_benchmark, prepare_training
from nanovlm.data.processors import load_tokenizer
from nanovlm.errors import UserError
from nanovlm.resources import NUM_KEPT, Resources, benchmark_key, training_data_key
from tests.tiny import digits_config

CONFIG = digits_config(batch_size=4)


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


@pytest.mark.parametrize(
    ("prepare", "key_of", "checked_each_time"),
    [
        (prepare_training, training_data_key, {("TrainConfig", "batch_size")}),
        (prepare_benchmark, benchmark_key, set()),
    ],
)
def test_keys_hold_what_preparing_reads(
    prepare: Callable[..., Any], key_of: Callable[..., Any], checked_each_time: set[Any]
) -> None:
    prepared, keyed = list[Any](), list[Any]()
    recorder = Recorder(CONFIG, prepared)
    prepare(recorder, load_tokenizer(recorder.vlm.lm_tokenizer))
    key_of(Recorder(CONFIG, keyed))
    assert set(prepared) - checked_each_time == set(keyed)


def test_training_data_is_kept_for_its_key_alone() -> None:
    resources = Resources("cpu")
    train_samples, val_samples = resources.training_data(CONFIG)
    again = dataclasses.replace(CONFIG, lr_mp=1.0, seed=5, batch_size=8)
    assert resources.training_data(again)[0] is train_samples
    fewer, _ = resources.training_data(dataclasses.replace(CONFIG, data_cutoff_idx=10))
    assert len(fewer) < len(train_samples)
    more_val = resources.training_data(dataclasses.replace(CONFIG, val_ratio=0.5))[1]
    assert len(more_val) > len(val_samples)


def test_the_batch_size_is_checked_for_every_trial() -> None:
    resources = Resources("cpu")
    resources.training_data(CONFIG)
    with pytest.raises(UserError, match="batch_size"):
        resources.training_data(dataclasses.replace(CONFIG, batch_size=10_000))


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


def test_a_dropped_model_gives_its_memory_back() -> None:
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
