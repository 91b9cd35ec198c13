"""The training loop on random samples and a model of a few thousand weights."""

import dataclasses
import math
import warnings
from collections import Counter
from linecache import getline
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F

from nanovlm.config.schema import Freeze, LearningRateSchedule, TrainConfig
from nanovlm.data.samples import collate, samples_in_order
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training import steps
from nanovlm.training.flops import model_flops, trained_parts
from nanovlm.training.forward import evaluating, image_input, model_input
from nanovlm.training.loop import Progress, num_steps, train
from nanovlm.training.steps import NonFiniteLossError, TrialInterrupted
from tests.devices import CPU, CUDA, on_each_device
from tests.tiny import vlm_config
from tests.training.samples import NUM_SAMPLES, random_samples

TINY = vlm_config(vit_patch_size=4, vit_img_size=8, lm_vocab_size=32, lm_max_length=16)
CONFIG = TrainConfig(batch_size=4, epochs=3, lr_mp=1e-2, lr_backbones=1e-2, compile=False, vlm=TINY)
EVERY_STEP = tuple(range(4, 37, 4))


def run(
    config: TrainConfig = CONFIG, milestones: tuple[int, ...] = EVERY_STEP
) -> tuple[list[Progress], VisionLanguageModel]:
    torch.manual_seed(0)
    model = VisionLanguageModel(config.vlm, seed=3).eval()  # as a loaded model may come
    return list(train(model, random_samples(), config, milestones, device=CPU)), model


def curve(reports: list[Progress]) -> list[float]:
    return [report.train_loss for report in reports]


def assert_same_weights(model: VisionLanguageModel, reference: VisionLanguageModel) -> None:
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv_proj.bias"):  # the gradient of a key's bias is rounding alone
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)


def test_reports_come_at_the_first_step_that_reaches_each_milestone() -> None:
    reports, _ = run(milestones=(1, 4, 5, 30, 31, 36))
    assert [r.step for r in reports] == [1, 2, 8, 9]
    assert [r.samples_seen for r in reports] == [4, 8, 32, 36]
    assert [r.is_final for r in reports] == [False, False, False, True]
    assert [r.step for r in run(milestones=())[0]] == [9]


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ((8, 4), "must be positive and ascending"),
        ((4, 4), "must be positive and ascending"),
        ((0, 4), "must be positive and ascending"),
        ((4, 37), r"within the full budget of 36 samples \(9 steps of batch_size 4\)"),
    ],
)
def test_milestones_that_cannot_be(milestones: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(milestones=milestones)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_samples", "expected"),
    [(1, 4, 12, 3), (3, 4, 12, 9), (3, 5, 12, 7), (1, 12, 12, 1), (1, 13, 12, 1), (2, 8, 12, 3)],
)
def test_num_steps(epochs: int, batch_size: int, num_samples: int, expected: int) -> None:
    assert num_steps(TrainConfig(epochs=epochs, batch_size=batch_size), num_samples) == expected


@pytest.mark.parametrize(("max_steps", "expected"), [(1, 1), (7, 7), (9, 9), (10, 9), (None, 9)])
def test_max_steps_or_the_epochs_end_the_training(max_steps: int | None, expected: int) -> None:
    config = dataclasses.replace(CONFIG, max_steps=max_steps)
    assert num_steps(config, NUM_SAMPLES) == expected


def test_the_schedule_spans_the_steps_that_are_taken() -> None:
    reports, _ = run(dataclasses.replace(CONFIG, max_steps=6, warmup_ratio=0.5), (4, 12, 20))
    assert [report.step for report in reports] == [1, 3, 5, 6]
    assert reports[-1].is_final and reports[-1].samples_seen == 24
    rates = [report.learning_rates["mp"] / 1e-2 for report in reports]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in (1 / 3, 2 / 3)]
    assert rates == pytest.approx([1 / 3, 1.0, *cosine])
    with pytest.raises(UserError, match=r"within the full budget of 24 samples \(6 steps of"):
        run(dataclasses.replace(CONFIG, max_steps=6), (25,))


@pytest.mark.parametrize("lr_backbones", [1e-2, 0.0])
def test_equal_rates_train_as_one_rate_does(lr_backbones: float) -> None:
    """To the last bit, though the optimizer has them in two groups."""
    config = dataclasses.replace(CONFIG, lr_mp=3e-3, lr_backbones=1e-2, weight_decay=0.1)
    one, expected = run(config)
    two, model = run(
        dataclasses.replace(
            config,
            lr_backbones=lr_backbones,
            lr_vision_backbone=1e-2,
            lr_language_backbone=1e-2,
        )
    )
    assert curve(two) == curve(one)
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_steps_equal_a_plain_loop_over_whole_batches() -> None:
    """Three steps on all samples at once, so that their order does not matter."""
    config = dataclasses.replace(
        CONFIG, batch_size=12, max_grad_norm=0.5, warmup_ratio=0.0, weight_decay=0.1, lr_mp=3e-3
    )
    reports, model = run(config, milestones=(12, 24, 36))

    reference = VisionLanguageModel(config.vlm, seed=3)
    named = dict(reference.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named.pop("MP.proj.weight")], "lr": 3e-3},
            {"params": named.values(), "lr": 1e-2},
        ],
        weight_decay=0.1,
        foreach=False,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    batch = collate(random_samples(), torch.arange(NUM_SAMPLES).numpy())
    losses = []
    for step in range(3):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 3)) / 2)
        hidden = reference.hidden_states(
            batch.token_ids, image_input(batch.images, TINY), model_input(batch, TINY).packing
        )
        loss = F.cross_entropy(reference.decoder.head(hidden), batch.targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()

    first, second, third = losses
    d = 0.95  # of the smoothed loss
    smoothed = [first, (d * first + second) / (d + 1), (d * d * first + d * second + third)]
    smoothed[2] /= d * d + d + 1
    assert curve(reports) == pytest.approx(smoothed, abs=1e-6)
    assert_same_weights(model, reference)
    rates = reports[-1].learning_rates
    expected_rates = {"mp": 3e-3, "vision_backbone": 1e-2, "language_backbone": 1e-2}
    assert rates == {name: pytest.approx(peak * 0.325) for name, peak in expected_rates.items()}


@pytest.mark.parametrize("batch_size", [4, 5])
def test_micro_batches_change_nothing(batch_size: int) -> None:
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    milestones = tuple(range(batch_size, 36, batch_size))
    whole, model = run(config, milestones)
    for size in (1, 3, batch_size, 100):
        split, split_model = run(dataclasses.replace(config, micro_batch_size=size), milestones)
        assert curve(split) == pytest.approx(curve(whole), abs=1e-5)
        assert_same_weights(split_model, model)


def test_the_loss_falls() -> None:
    reports, _ = run(dataclasses.replace(CONFIG, epochs=30), milestones=(4,))
    assert reports[-1].train_loss < 0.3 * reports[0].train_loss


@pytest.mark.parametrize(
    ("milestones", "counted"),
    [
        ((4, 12), [(0, 4), (4, 12), (12, 36)]),
        ((12,), [(4, 12), (12, 36)]),  # without the first step
    ],
)
@pytest.mark.parametrize("freeze", ["none", "vision_encoder"])
def test_the_speed_counts_the_steps_since_the_report_before(
    milestones: tuple[int, ...], counted: list[tuple[int, int]], freeze: Freeze
) -> None:
    """Whatever the time was: the rates stand in the relation of what the steps held."""
    config = dataclasses.replace(CONFIG, freeze=freeze, micro_batch_size=3)
    reports, _ = run(config, milestones)
    samples = random_samples()
    flops = model_flops(TINY, trained_parts(config))
    for report, (start, stop) in zip(reports, counted, strict=True):
        indices = samples_in_order(NUM_SAMPLES, config.seed, start, stop)
        num_labels = int(samples.num_answer_tokens[indices].sum())
        expected = flops.of_samples(samples.text_lengths[indices].numpy(), num_labels)
        speed = report.speed
        a_second = speed.samples_per_second / (stop - start)
        assert speed.answer_tokens_per_second == pytest.approx(num_labels * a_second)
        assert speed.model_tflops_per_second == pytest.approx(expected / 1e12 * a_second)
        assert 0 < speed.data_wait_fraction < 1


def test_train_loss_does_not_depend_on_the_milestones() -> None:
    dense, sparse = run()[0], run(milestones=(13, 29))[0]
    assert [(r.step, r.train_loss) for r in sparse] == [
        (r.step, r.train_loss) for r in dense if r.step in (4, 8, 9)
    ]


def test_the_caller_may_evaluate_between_reports() -> None:
    """With dropout: neither the mode of the model nor the random numbers are disturbed."""
    vlm = dataclasses.replace(TINY, lm_dropout=0.2, vit_dropout=0.2)
    config = dataclasses.replace(CONFIG, vlm=vlm)
    expected, _ = run(config)
    torch.manual_seed(0)
    model = VisionLanguageModel(vlm, seed=3)
    losses = []
    batch = collate(random_samples(), torch.arange(4).numpy())
    for report in train(model, random_samples(), config, EVERY_STEP, device=CPU):
        losses.append(report.train_loss)
        with evaluating(model):
            model.generate(torch.ones(4, 3, dtype=torch.int64), image_input(batch.images, TINY))
    assert losses == curve(expected)
    without_dropout, _ = run()
    assert losses != curve(without_dropout)


def test_max_grad_norm() -> None:
    def last_norm(max_grad_norm: float | None) -> float:
        _, model = run(dataclasses.replace(CONFIG, max_grad_norm=max_grad_norm))
        return torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        ).item()

    assert last_norm(0.01) == pytest.approx(0.01, rel=1e-3)
    assert last_norm(None) > 0.1
    assert last_norm(1e6) == last_norm(None)


def test_learning_rate_0_keeps_the_weights() -> None:
    reports, model = run(dataclasses.replace(CONFIG, lr_backbones=0.0))
    assert set(reports[-1].learning_rates) == {"mp"}
    initial = VisionLanguageModel(TINY, seed=3).state_dict()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, initial[n])}
    assert changed == {"MP.proj.weight"}


@pytest.mark.parametrize(
    ("freeze", "frozen_parts"),
    [("vision_encoder", {"vision_encoder"}), ("backbones", {"vision_encoder", "decoder"})],
)
def test_what_is_frozen_keeps_its_weights_and_gets_no_gradients(
    freeze: Freeze, frozen_parts: set[str]
) -> None:
    _, model = run(dataclasses.replace(CONFIG, freeze=freeze, weight_decay=0.1))
    initial = VisionLanguageModel(TINY, seed=3).state_dict()
    parts: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        parts[torch.equal(parameter, initial[name])].add(name.partition(".")[0])
        assert (parameter.grad is None) == name.startswith(tuple(frozen_parts)), name
    assert parts[True] == frozen_parts
    assert parts[False] == {"vision_encoder", "MP", "decoder"} - frozen_parts


def test_backward_does_not_run_through_a_frozen_vision_encoder() -> None:
    config = dataclasses.replace(CONFIG, freeze="vision_encoder")
    model = VisionLanguageModel(TINY, seed=3)
    has_graph = list[bool]()
    model.vision_encoder.register_forward_hook(
        lambda module, arguments, output: has_graph.append(output.requires_grad)
    )
    for changed in (config, CONFIG):
        next(train(model, random_samples(), changed, EVERY_STEP, device=CPU))
    assert has_graph == [False, True]


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.127142), ("linear", 0.2), ("constant", 1.0)]
)
def test_the_schedule_of_the_configuration_is_used(
    schedule: LearningRateSchedule, last: float
) -> None:
    reports, _ = run(dataclasses.replace(CONFIG, lr_schedule=schedule))
    assert reports[-1].learning_rates["mp"] == pytest.approx(1e-2 * last, rel=1e-4)


def test_interruption_ends_at_the_next_step() -> None:
    answers = iter([False, False, True])
    model = VisionLanguageModel(TINY)
    training = train(
        model, random_samples(), CONFIG, EVERY_STEP, device=CPU, interrupted=lambda: next(answers)
    )
    assert [next(training).step, next(training).step] == [1, 2]
    with pytest.raises(TrialInterrupted, match="step 3"):
        next(training)
    assert list(answers) == []  # asked exactly once a step


@on_each_device
@pytest.mark.parametrize("quantity", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_ends_training_before_the_step(
    quantity: str, device: torch.device
) -> None:
    """The fused optimizer leaves weights, moments and its count of steps as they were."""
    model = VisionLanguageModel(TINY, seed=3).to(device)
    weights = model.MP.proj.weight
    training = train(model, random_samples(), CONFIG, EVERY_STEP, device=device)
    tensors = next(training).state().tensors  # those that are trained, no copies
    assert {name.rpartition(".")[2] for name in tensors} >= {"weight", "exp_avg", "exp_avg_sq"}
    if quantity == "loss":
        weights.data[0, 0] = math.nan
    else:
        weights.register_hook(lambda gradient: gradient * math.inf)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(NonFiniteLossError, match=f"{quantity} is (nan|inf) at step 2") as caught:
        next(training)
    assert (caught.value.step, caught.value.quantity) == (2, quantity)
    assert not math.isfinite(caught.value.value)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("failing", [3, 4, 9])
def test_a_step_launched_behind_one_that_fails_changes_nothing(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the next step is launched before the numbers of the one before are read."""
    monkeypatch.setattr(steps, "_max_ahead", lambda device: 1)
    seen: list[dict[str, torch.Tensor]] = []

    class Spoilt(VisionLanguageModel):
        """Its gradients are not finite in one step; a copy of the weights is kept before each."""

        def hidden_states(self, *arguments: Any) -> torch.Tensor:
            seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
            hidden = super().hidden_states(*arguments)
            return hidden * math.inf if len(seen) == failing else hidden

    model = Spoilt(TINY, seed=3)
    milestones = (3 * CONFIG.batch_size,)
    training = train(model, random_samples(), CONFIG, milestones, device=CPU)
    with pytest.raises(NonFiniteLossError) as caught:
        list(training)
    assert caught.value.step == failing
    assert len(seen) == failing + (failing == 4), "a step was launched behind it, unless it reports"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[failing - 1][name]), name


def test_running_ahead_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, float]]] = [[], []]
    reports = []
    for ahead, seen_now in enumerate(seen):
        monkeypatch.setattr(steps, "_max_ahead", lambda device, ahead=ahead: ahead)

        def note(
            step: int, loss: float, waited: float, seen: list[tuple[int, float]] = seen_now
        ) -> None:
            seen.append((step, loss))

        training = train(
            VisionLanguageModel(TINY, seed=3),
            random_samples(),
            CONFIG,
            (CONFIG.batch_size,),
            device=CPU,
            on_step=note,
        )
        reports.append([(report.step, report.train_loss) for report in training])
    assert reports[0] == reports[1]
    assert seen[0] == seen[1] and [step for step, _ in seen[0]] == list(range(1, len(seen[0]) + 1))


def test_the_error_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(NonFiniteLossError(7, "loss", math.inf)))
    assert (error.step, error.quantity, error.value) == (7, "loss", math.inf)
    assert str(error) == "loss is inf at step 7"


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch_size", ["auto", 5])
def test_a_step_waits_for_the_device_once(micro_batch_size: int | Literal["auto"]) -> None:
    """For its loss, with the next batch already on its way; dropout and clipping wait for nothing.

    What waits is identified by its line, so a failure names those that should not.
    """
    vlm = dataclasses.replace(TINY, lm_dropout=0.2, vit_dropout=0.2)
    config = dataclasses.replace(
        CONFIG, batch_size=12, micro_batch_size=micro_batch_size, max_grad_norm=0.5, vlm=vlm
    )

    def waits(num_steps: int) -> Counter[str]:
        model = VisionLanguageModel(vlm).to(CUDA)
        longer = dataclasses.replace(config, epochs=num_steps)
        training = train(model, random_samples(), longer, (), device=CUDA)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                list(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return Counter(
            f"{Path(warning.filename).name}: {getline(warning.filename, warning.lineno).strip()}"
            for warning in caught
            if "synchronizing CUDA operation" in str(warning.message)
        )

    waits(1)  # what is set up once a process
    of_five_steps = waits(9) - waits(4)
    assert list(of_five_steps.values()) == [5], of_five_steps
    (line,) = of_five_steps
    assert line.startswith("steps.py: ") and line.endswith("# waits for the device")
