"""Training on samples with tiles: what a batch computes, how steps are divided, what is padded."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.evaluation.validation import validation_loss
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training import passes
from nanovlm.training.forward import answer_loss_sum, image_input
from nanovlm.training.loader import Loader
from nanovlm.training.loop import train
from nanovlm.training.passes import MicroBatchSize, costs_of, in_groups
from tests.devices import CPU, CUDA
from tests.training.tiled_samples import VLM, Sample, tiled_samples

CONFIG = TrainConfig(batch_size=12, epochs=2, lr_mp=1e-2, lr_backbones=1e-3, compile=False, vlm=VLM)
SAMPLES, WHOLE = tiled_samples()
COSTS = costs_of(SAMPLES.text_lengths, SAMPLES.slots.counts, VLM)


def loss_of(model: VisionLanguageModel, sample: Sample) -> torch.Tensor:
    """Return the summed loss of one sample by itself, from ids with placeholders."""
    images = image_input(SAMPLES.images[sample.tiles], VLM)
    targets = torch.tensor([sample.targets])
    _, mean = model(torch.tensor([sample.input_ids]), images, targets=targets)
    return mean * (targets >= 0).sum()


def gradients(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
def test_a_batch_computes_what_its_samples_do_alone(has_fixed_shapes: bool) -> None:
    """No sample sees another, and padding changes nothing: neither losses nor gradients."""
    model = VisionLanguageModel(VLM, seed=1)
    loader = Loader(SAMPLES, VLM, CPU, has_fixed_shapes=has_fixed_shapes)
    inputs = loader.take(np.arange(len(SAMPLES)))
    together = answer_loss_sum(model, inputs)
    together.backward()
    expected = gradients(model)
    model.zero_grad()
    alone = sum((loss_of(model, sample) for sample in WHOLE), torch.zeros(()))
    alone.backward()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert int(SAMPLES.num_answer_tokens.sum()) == len(inputs.labels)


def test_samples_without_images_train_too() -> None:
    """Every parameter gets a gradient, so that several workers always send the same ones."""
    indices = np.flatnonzero(SAMPLES.slots.counts.numpy() == 0)
    assert len(indices) > 1
    model = VisionLanguageModel(VLM, seed=1)
    answer_loss_sum(model, Loader(SAMPLES, VLM, CPU).take(indices)).backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    assert not model.MP.proj.weight.grad.any()  # type: ignore[union-attr]


def test_parts_of_the_samples_know_their_images() -> None:
    part = dataclasses.replace(
        SAMPLES,
        slots=SAMPLES.slots.part(5, 9),
        offsets=SAMPLES.offsets[5:10],
        prompt_lengths=SAMPLES.prompt_lengths[5:9],
    )
    assert len(part) == 4
    assert part.num_answer_tokens.tolist() == SAMPLES.num_answer_tokens[5:9].tolist()
    for ours, theirs in zip(
        Loader(part, VLM, CPU).take(np.arange(4)).tensors(),
        Loader(SAMPLES, VLM, CPU).take(np.arange(5, 9)).tensors(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_few_shapes_and_little_padding() -> None:
    """Of passes as steps make them; a shape is what compiled code depends on."""
    samples, _ = tiled_samples(number=2000, seed=1)
    loader = Loader(samples, VLM, CPU, has_fixed_shapes=True)
    costs = costs_of(samples.text_lengths, samples.slots.counts, VLM)
    order = np.random.default_rng(0).permutation(len(samples))
    shapes, real, total = set(), 0, 0
    for step in np.array_split(order, 20):
        step = step[np.argsort(-costs[step], kind="stable")]
        for indices in in_groups(step, costs[step], 1000):
            inputs = loader.take(indices)
            shapes.add((len(inputs.images), *(tensor.shape for tensor in inputs.packing)))
            real += int((samples.text_lengths + samples.slots.counts)[indices].sum())
            total += len(inputs.packing.positions)
    assert len(shapes) < 50
    assert real > 0.75 * total


def test_a_step_is_divided_by_costs_the_largest_samples_first() -> None:
    order = np.argsort(-COSTS, kind="stable")
    groups = MicroBatchSize(CPU).split(order, CONFIG, COSTS[order])
    assert np.concatenate(groups).tolist() == order.tolist()
    assert len(groups) == 1
    groups = in_groups(order, COSTS[order], 200)
    assert np.concatenate(groups).tolist() == order.tolist()
    sums = [int(COSTS[group].sum()) for group in groups]
    assert max(sums) <= 200
    for total, after in zip(sums, groups[1:], strict=False):
        assert total + COSTS[after[0]] > 200, "another sample would have fitted"
    assert list(map(len, in_groups(order[:3], np.array([9, 3, 3]), 6))) == [1, 2]


def test_out_of_memory_halves_the_costs() -> None:
    """Down to single samples, whatever the largest costs, and never for ever."""
    notes: list[str] = []
    size = MicroBatchSize(CUDA, notes.append)
    indices, costs = np.arange(5), np.array([90, 10, 10, 10, 10])
    seen = [list(map(len, size.split(indices, CONFIG, costs)))]
    while size.halve(indices, CONFIG, costs):
        seen.append(list(map(len, size.split(indices, CONFIG, costs))))
    assert seen == [[5], [1, 4], [1, 2, 2], [1] * 5]
    assert notes[0] == (
        "out of GPU memory with micro_batch_size 130 patches and tokens: 65 from now on"
    )


def trained(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = VisionLanguageModel(config.vlm, seed=3)
    reports = list(train(model, SAMPLES, config, (12, 48), device=CPU))
    return [report.train_loss for report in reports], model.state_dict()


@pytest.mark.parametrize("micro_batch_size", ["auto", 3])
def test_training_is_the_same_in_any_passes(
    micro_batch_size: int | Literal["auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_losses, expected = trained(CONFIG)
    monkeypatch.setitem(passes.TILED_COSTS, "cpu", 150)
    losses, state = trained(dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert expected_losses[1] < expected_losses[0]
    for name, tensor in state.items():
        if not name.endswith("qkv_proj.bias"):  # the gradient of a key's bias is rounding alone
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_validation_loss_is_the_mean_of_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionLanguageModel(VLM, seed=1)
    with torch.no_grad():
        total = sum(float(loss_of(model.eval(), sample)) for sample in WHOLE)
    expected = total / int(SAMPLES.num_answer_tokens.sum())
    assert validation_loss(model, SAMPLES, CPU) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setitem(passes.TILED_COSTS, "cpu", 100)
    assert validation_loss(model, SAMPLES, CPU) == pytest.approx(expected, rel=1e-5)


def test_what_a_sample_costs() -> None:
    """Four patches and one token of a tile, beside the text."""
    assert costs_of(torch.tensor([7, 0, 3]), torch.tensor([2, 1, 0]), VLM).tolist() == [17, 5, 3]
