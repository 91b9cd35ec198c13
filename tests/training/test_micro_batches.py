"""How a step is cut into passes, and what happens when the memory does not suffice for one."""

import dataclasses
import gc
import weakref
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from nanovlm.config.schema import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import Progress, train
from nanovlm.training.passes import CPU_PATCHES, MicroBatchSize
from nanovlm.training.steps import TrialInterrupted
from tests.devices import CPU, CUDA, deterministic_algorithms
from tests.tiny import vlm_config
from tests.training.samples import random_samples

VLM = vlm_config(
    vit_patch_size=4, vit_img_size=8, lm_vocab_size=32, lm_max_length=16, lm_dropout=0.2
)
CONFIG = TrainConfig(batch_size=12, epochs=2, lr_mp=1e-2, compile=False, vlm=VLM)


def sizes(size: MicroBatchSize, num_samples: int, config: TrainConfig = CONFIG) -> list[int]:
    parts = size.split(np.arange(num_samples), config)
    assert np.concatenate(parts).tolist() == list(range(num_samples))
    return list(map(len, parts))


@pytest.mark.parametrize(
    ("configured", "expected"), [(1, [1] * 7), (3, [3, 2, 2]), (4, [4, 3]), (7, [7]), (256, [7])]
)
def test_a_configured_size_need_not_divide(configured: int, expected: list[int]) -> None:
    config = dataclasses.replace(CONFIG, micro_batch_size=configured)
    assert (
        sizes(MicroBatchSize(CPU), 7, config) == sizes(MicroBatchSize(CUDA), 7, config) == expected
    )


def test_on_cpu_the_images_limit_it() -> None:
    at_224 = dataclasses.replace(CONFIG, vlm=vlm_config(vit_img_size=224, vit_patch_size=16))
    huge = dataclasses.replace(CONFIG, vlm=vlm_config(vit_img_size=1024, vit_patch_size=8))
    assert CPU_PATCHES // 14**2 == 10
    assert sizes(MicroBatchSize(CPU), 32, at_224) == [8, 8, 8, 8]
    assert sizes(MicroBatchSize(CPU), 2, huge) == [1, 1]
    assert sizes(MicroBatchSize(CUDA), 256, at_224) == [256]


def test_halving_ends_at_one_sample() -> None:
    notes: list[str] = []
    size = MicroBatchSize(CUDA, notes.append)
    seen = [sizes(size, 11)]
    while size.halve(np.arange(11), CONFIG):
        seen.append(sizes(size, 11))
    assert [max(parts) for parts in seen] == [11, 6, 3, 2, 1]
    assert notes[0] == "out of GPU memory with micro_batch_size 11: 6 from now on"
    assert len(notes) == 4


def test_a_configured_size_is_not_halved() -> None:
    config = dataclasses.replace(CONFIG, micro_batch_size=4)
    assert not MicroBatchSize(CUDA, pytest.fail).halve(np.arange(12), config)


class Memory:
    """Lets a pass over more than `most` images run out of memory, in its forward or backward."""

    def __init__(self, most: int, where: str) -> None:
        self.most, self.where = most, where
        self.passes: list[int] = []

    def watch(self, encoder: nn.Module) -> None:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self.passes.append(len(output))
            if len(output) <= self.most:
                return
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            output.register_hook(self._fail)

        encoder.register_forward_hook(hook)

    def _fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def run(
    config: TrainConfig, size: MicroBatchSize, memory: Memory
) -> tuple[list[Progress], VisionLanguageModel]:
    torch.manual_seed(0)
    model = VisionLanguageModel(config.vlm, seed=3)
    memory.watch(model.vision_encoder)
    return list(
        train(model, random_samples(), config, (12, 24), device=CPU, micro_batch_size=size)
    ), model


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_repeats_the_step_with_the_same_result(where: str) -> None:
    """To the bit that of a trial that was configured with the smaller size, with dropout."""
    notes: list[str] = []
    size = MicroBatchSize(CPU, notes.append)
    small = Memory(most=3, where=where)
    reports, model = run(CONFIG, size, small)
    configured = dataclasses.replace(CONFIG, micro_batch_size=3)
    expected, expected_model = run(configured, MicroBatchSize(CPU), Memory(most=100, where=where))
    assert small.passes == [12, 6, *[3] * 8]
    assert [r.train_loss for r in reports] == [r.train_loss for r in expected]
    state = model.state_dict()
    for name, tensor in expected_model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert notes == [
        "out of GPU memory with micro_batch_size 12: 6 from now on",
        "out of GPU memory with micro_batch_size 6: 3 from now on",
    ]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_of_a_pass_that_failed_stays_in_memory(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Though log records are kept, as by pytest or a service that collects errors."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    model = VisionLanguageModel(CONFIG.vlm)

    def hook(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output))

    model.vision_encoder.register_forward_hook(hook)
    Memory(most=3, where=where).watch(model.vision_encoder)
    next(train(model, random_samples(), CONFIG, (12,), device=CPU))
    assert "CUDA out of memory." in caplog.text
    assert alive[:3] == [0, 0, 0]


def test_an_interruption_is_heard_though_memory_runs_out() -> None:
    model = VisionLanguageModel(CONFIG.vlm)
    Memory(most=3, where="backward").watch(model.vision_encoder)
    answers = iter([True])  # asked once a step
    training = train(
        model, random_samples(), CONFIG, (), device=CPU, interrupted=lambda: next(answers)
    )
    with pytest.raises(TrialInterrupted, match="step 1"):
        next(training)


def test_the_next_trial_begins_with_what_fits_and_says_so() -> None:
    notes: list[str] = []
    size = MicroBatchSize(CPU, notes.append)
    size.begin_trial()
    assert not notes
    run(CONFIG, size, Memory(most=3, where="forward"))
    notes.clear()
    size.begin_trial()
    assert notes == ["out of GPU memory before: micro_batch_size 3 at most"]
    later = Memory(most=3, where="forward")
    run(CONFIG, size, later)
    assert later.passes == [3] * 8


def test_a_sample_that_does_not_fit_ends_the_trial() -> None:
    memory = Memory(most=0, where="forward")
    with pytest.raises(torch.OutOfMemoryError):
        run(CONFIG, MicroBatchSize(CPU, lambda text: None), memory)
    assert memory.passes == [12, 6, 3, 2, 1]


LARGE_VLM = vlm_config(
    vit_hidden_dim=256,
    vit_patch_size=8,
    vit_img_size=256,
    vit_n_heads=4,
    vit_n_blocks=4,
    vit_dropout=0.1,
    mp_pixel_shuffle_factor=8,
    lm_vocab_size=32,
    lm_max_length=16,
)
"""1,024 patches an image: hundreds of megabytes a pass, of which weights and moments are 60."""


def train_large(size: MicroBatchSize, configured: int | Literal["auto"]) -> list[float]:
    """Return the losses of two steps of twelve large images on the GPU."""
    config = dataclasses.replace(CONFIG, micro_batch_size=configured, vlm=LARGE_VLM)
    images = torch.arange(6 * 3 * 256 * 256).reshape(6, 3, 256, 256) % 251
    samples = dataclasses.replace(random_samples(), images=images.to(torch.uint8))
    torch.manual_seed(0)
    model = VisionLanguageModel(LARGE_VLM, seed=3).to(CUDA)
    reports = train(model, samples, config, (12, 24), device=CUDA, micro_batch_size=size)
    return [report.train_loss for report in reports]


def forget_memory() -> None:
    """Give back what no tensor uses, and forget how much was used."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_repeats_the_step_with_the_same_result() -> None:
    """With half the room between what 6 and 12 samples take, a pass of 12 fails and 6 are taken.

    The losses are to the bit those of a trial that was configured so, with dropout, if operations
    are deterministic.
    """
    with deterministic_algorithms():
        train_large(MicroBatchSize(CUDA), 6)  # loads what stays in memory
        forget_memory()
        expected = train_large(MicroBatchSize(CUDA), 6)
        room_for_6 = torch.cuda.max_memory_reserved()
        forget_memory()
        train_large(MicroBatchSize(CUDA), 12)
        taken_by_12 = torch.cuda.max_memory_allocated()
        assert room_for_6 < taken_by_12
        forget_memory()
        limit = (room_for_6 + taken_by_12) / 2
        notes: list[str] = []
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        try:
            losses = train_large(MicroBatchSize(CUDA, notes.append), "auto")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert notes == ["out of GPU memory with micro_batch_size 12: 6 from now on"]
    assert losses == expected
