"""Passes that are recorded: as CUDA graphs on a GPU, by a stand-in on CPU."""

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovlm.config.schema import TrainConfig
from nanovlm.models.packing import pack
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training import cuda_graphs, steps
from nanovlm.training.cuda_graphs import Pass, RecordedPasses
from nanovlm.training.forward import ModelInput, choose_algorithms
from nanovlm.training.loop import train
from tests.devices import CPU, CUDA
from tests.tiny import vlm_config
from tests.training.samples import random_samples

VLM = vlm_config(
    vit_patch_size=4,
    vit_img_size=8,
    lm_vocab_size=32,
    lm_max_length=16,
    vit_dropout=0.1,
    lm_dropout=0.1,
)
CONFIG = TrainConfig(batch_size=4, epochs=3, lr_mp=1e-2, lr_backbones=1e-2, vlm=VLM)
EVERY_STEP = tuple(range(4, 37, 4))


class StandIn:
    """Computes again at each replay, into the same memory, as a CUDA graph does."""

    num_made = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        StandIn.num_made += 1
        memory: list[Tensor] = []

        def replay() -> Tensor:
            result = compute()
            if not memory:
                memory.append(result)
            return memory[0].copy_(result)

        return replay


def batch(num_samples: int, first: int) -> ModelInput:
    """Samples of one token each; all numbers count up from `first`."""
    count = torch.arange(first, first + num_samples + 1)
    packing = pack(torch.ones(num_samples, dtype=torch.int64), 4, num_samples + 1)
    return ModelInput(count, count[:num_samples], packing, count[:num_samples], count[:num_samples])


def test_a_recording_reads_each_batch_and_its_results_stay() -> None:
    StandIn.num_made = 0
    runs: list[int] = []

    def run(inputs: ModelInput, number: Tensor) -> Tensor:
        runs.append(len(inputs.images))
        return (sum(tensor.sum() for tensor in inputs.tensors()) * number).float()

    passes = RecordedPasses(run, StandIn())
    batches = [batch(size, first) for first, size in enumerate([2, 3, 2, 2, 3, 2])]
    numbers = [torch.tensor(float(7 + i)) for i in range(len(batches))]
    found = [passes(*given) for given in zip(batches, numbers, strict=True)]
    expected = [run(*given) for given in zip(batches, numbers, strict=True)]
    assert found == expected
    assert StandIn.num_made == 2, "one for each shape, at its second time"


@pytest.mark.parametrize("micro_batch_size", [4, 3])
def test_training_by_recordings_is_the_same(
    micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit but for padded labels, which add zeros to sums."""
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size, compile=False)
    curves = []
    for is_recorded in (False, True):
        monkeypatch.setattr(steps, "_is_recorded", lambda *_, answer=is_recorded: answer)
        monkeypatch.setattr(cuda_graphs, "GraphRecorder", StandIn)
        torch.manual_seed(0)
        model = VisionLanguageModel(VLM, seed=3)
        model.compiled = True  # the shapes of compiled code, without the compiler
        reports = train(model, random_samples(), config, EVERY_STEP, device=CPU)
        curves.append([report.train_loss for report in reports])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_what_a_training_held_is_free_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when garbage is collected: on a GPU that is most of its memory."""
    made: list[weakref.ref[RecordedPasses]] = []

    class Watched(RecordedPasses):
        def __init__(self, run: Pass) -> None:
            super().__init__(run, StandIn())
            made.append(weakref.ref(self))

    monkeypatch.setattr(steps, "_is_recorded", lambda *_: True)
    monkeypatch.setattr(steps, "RecordedPasses", Watched)
    training = train(VisionLanguageModel(VLM), random_samples(), CONFIG, EVERY_STEP, device=CPU)
    gc.disable()
    try:
        next(training)
        next(training)
        assert made[0]() is not None
        training.close()
        assert made[0]() is None
    finally:
        gc.enable()


def curve_on_gpu(config: TrainConfig) -> list[float]:
    choose_algorithms(config, CUDA)
    torch.manual_seed(0)
    with CUDA:
        model = VisionLanguageModel(VLM, seed=3, compiled=True)
    reports = train(model, random_samples(), config, EVERY_STEP, device=CUDA)
    return [report.train_loss for report in reports]


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch_size", [4, 3])
def test_cuda_graphs_give_the_bits_of_single_launches(
    micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose random numbers go on from replay to replay."""
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    recorded = curve_on_gpu(config)
    assert recorded == curve_on_gpu(config)
    monkeypatch.setattr(cuda_graphs, "GraphRecorder", StandIn)
    StandIn.num_made = 0
    assert recorded == curve_on_gpu(config)
    assert StandIn.num_made
