"""Whole trials on the digits: a thousandth of the demo, the same path."""

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from nanovlm.config.generations import PUBLISHED_IMAGES
from nanovlm.config.schema import Freeze
from nanovlm.config.sources import Layer, build_config, config_values, parse_overrides
from nanovlm.errors import UserError
from nanovlm.messages import Job, ProgressUpdate, Report
from nanovlm.models import compiled
from nanovlm.models.compiled import find_compile_obstacle
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.training.steps import NonFiniteLossError, TrialInterrupted
from nanovlm.trial import run_trial
from tests.tiny import digits_config, vlm_config

VLM = vlm_config(vit_hidden_dim=32, lm_hidden_dim=32, lm_inter_dim=64)
CONFIG = digits_config(
    VLM, lr_mp=1e-3, lr_backbones=1e-3, batch_size=16, mmstar_batch_size=128, seed=1
)


@pytest.fixture(scope="module")
def resources() -> Resources:
    """One warm worker for all tests of this file, in whatever order they come."""
    return Resources("cpu")


def run(resources: Resources, milestones: tuple[int, ...] = (), **changes: Any) -> list[Report]:
    config = dataclasses.replace(CONFIG, **changes)
    return list(run_trial(Job(trial_id="t", config=config, milestones=milestones), resources))


def numbers(reports: list[Report]) -> list[tuple[int, int, bool, dict[str, float]]]:
    """Every number but the seconds."""
    return [(r.samples_seen, r.step, r.is_final, r.metrics) for r in reports]


def test_reports(resources: Resources) -> None:
    first, last = run(resources, milestones=(20,))
    assert (first.samples_seen, first.step, first.is_final) == (32, 2, False)
    assert last.samples_seen == 16 * last.step and last.is_final
    assert 0 < first.first_step_seconds < first.seconds < last.seconds
    assert last.first_step_seconds == first.first_step_seconds
    assert {"mmstar_accuracy", "mmstar_standard_error", "mmstar_macro_accuracy",
            "mmstar_accuracy/math", "val_loss", "train_loss"} <= set(last.metrics)  # fmt: skip
    assert all(type(value) is float and math.isfinite(value) for value in last.metrics.values())
    assert last.metrics["val_loss"] < first.metrics["val_loss"]


def test_the_speed_of_each_report(resources: Resources) -> None:
    """Training is all that it holds: the steps since the report before, without the evaluation."""
    reports = run(resources, milestones=(16, 48))
    before = 0.0
    for report in reports:
        speed = report.speed
        assert speed is not None
        # Each of the digits' answers is a letter and EOS.
        ratio = speed.answer_tokens_per_second / speed.samples_per_second
        assert ratio == pytest.approx(2)
        assert 0 < speed.data_wait_fraction < 1
        assert 0 < speed.model_tflops_per_second < 10
        assert speed.model_flops_utilization is None
        assert 0.01 < speed.peak_memory_gib < 100
        assert 0 < report.evaluation_seconds < report.seconds - before
        before = report.seconds
    first, second, _ = reports
    in_between = second.seconds - first.seconds - second.evaluation_seconds
    assert second.speed is not None and second.speed.samples_per_second > 32 / in_between
    assert not {"speed", "samples_per_second", "evaluation_seconds"} & set(first.metrics)


def test_a_trial_is_the_same_alone_and_after_others(resources: Resources) -> None:
    """To the bit, with dropout, whatever ran before in this worker and however it ended."""
    vlm = dataclasses.replace(VLM, lm_dropout=0.1)
    milestones = (32, 64)
    alone = run(Resources("cpu"), milestones, vlm=vlm)

    run(resources, vlm=vlm, seed=2, lr_backbones=0.0, batch_size=8, micro_batch_size=3)
    with pytest.raises(NonFiniteLossError):
        run(resources, vlm=vlm, lr_mp=1e30, lr_backbones=1e30, max_grad_norm=None)
    stopped = run_trial(
        Job(trial_id="s", config=dataclasses.replace(CONFIG, vlm=vlm), milestones=(16,)), resources
    )
    next(stopped)
    stopped.close()
    torch.rand(3)
    assert numbers(run(resources, milestones, vlm=vlm)) == numbers(alone)


def test_a_trial_is_the_same_if_wandb_follows_it(resources: Resources) -> None:
    followed = run(resources, (32,), log_wandb=True, wandb_entity="team")
    assert numbers(followed) == numbers(run(resources, (32,)))


@pytest.mark.parametrize("freeze", ["vision_encoder", "backbones"])
def test_a_frozen_trial_leaves_nothing_frozen(resources: Resources, freeze: Freeze) -> None:
    alone = run(Resources("cpu"))
    frozen = run(resources, freeze=freeze)
    assert numbers(frozen) != numbers(alone)
    assert numbers(run(resources)) == numbers(alone)
    assert numbers(run(resources, freeze=freeze)) == numbers(frozen)


def test_milestones_do_not_change_the_numbers(resources: Resources) -> None:
    num_samples = len(resources.training_data(CONFIG)[0])
    dense = run(resources, milestones=tuple(range(16, num_samples + 1, 16)))
    sparse = run(resources, milestones=(48,))
    steps = [report.step for report in sparse]
    assert numbers(sparse) == numbers([report for report in dense if report.step in steps])


def test_the_seed_decides(resources: Resources) -> None:
    assert numbers(run(resources, seed=7)) != numbers(run(resources))


def test_a_trial_leaves_no_gradients(resources: Resources) -> None:
    run(resources)
    assert all(p.grad is None for p in resources.model(CONFIG).parameters())
    training = run_trial(Job(trial_id="t", config=CONFIG, milestones=(16,)), resources)
    next(training)
    training.close()
    assert all(p.grad is None for p in resources.model(CONFIG).parameters())


def test_the_answers_of_each_report_are_kept(resources: Resources, tmp_path: Path) -> None:
    file = tmp_path / "answers" / "t.jsonl"
    job = Job(trial_id="t", config=CONFIG, milestones=(16, 48), answers_file=str(file))
    indices = resources.benchmark(CONFIG).indices
    texts = []
    for report in run_trial(job, resources):
        texts.append(file.read_text())
        items = [json.loads(line) for line in texts[-1].splitlines()]
        assert tuple(item["index"] for item in items) == indices
        assert [*items[0]] == ["index", "answer", "output", "correct", "letter", "letter_nll"]
        right = [item["correct"] for item in items]
        letters = [item["letter"] == item["answer"] for item in items]
        assert report.metrics["mmstar_accuracy"] == sum(right) / len(items)
        assert report.metrics["mmstar_letter_accuracy"] == sum(letters) / len(items)
        nll = sum(item["letter_nll"] for item in items) / len(items)
        assert report.metrics["mmstar_letter_nll"] == pytest.approx(nll)
    assert len(set(texts)) == 3
    assert [path.name for path in file.parent.iterdir()] == ["t.jsonl"]
    again = dataclasses.replace(job, milestones=(), answers_file=str(tmp_path / "again.jsonl"))
    list(run_trial(again, Resources("cpu")))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


def test_a_metric_that_is_not_finite_fails_the_trial(resources: Resources) -> None:
    """The last step spoils the weights, and no later loss would tell."""
    settings: dict[str, Any] = {
        "batch_size": 60,
        "lr_mp": 1e30,
        "lr_backbones": 1e30,
        "max_grad_norm": None,
    }
    with pytest.raises(NonFiniteLossError, match="mmstar_letter_nll is nan at step 1"):
        run(resources, **settings)


def test_interruption(resources: Resources) -> None:
    asked: list[bool] = []

    def after_two_steps() -> bool:
        asked.append(len(asked) >= 2)
        return asked[-1]

    job = Job(trial_id="t", config=CONFIG, milestones=(16, 32, 48))
    training = run_trial(job, resources, after_two_steps)
    assert [next(training).step, next(training).step] == [1, 2]
    with pytest.raises(TrialInterrupted):
        next(training)


def test_the_final_model_is_saved(resources: Resources, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    job = Job(trial_id="t", config=CONFIG, milestones=(16,), output_dir=folder)
    assert len([report for report in run_trial(job, resources)]) == 2
    saved = VisionLanguageModel.from_pretrained(folder).state_dict()

    frozen = dataclasses.replace(CONFIG, lr_mp=1e-30, lr_backbones=1e-30, weight_decay=0.0)
    resumed = dataclasses.replace(
        frozen,
        resume_from_vlm_checkpoint=True,
        vlm=dataclasses.replace(VLM, vlm_checkpoint_path=folder, vlm_load_backbone_weights=True),
    )
    for job in (
        Job(trial_id="t", config=frozen, checkpoint=folder),
        Job(trial_id="t", config=resumed),
    ):
        list(run_trial(job, resources))
        model = resources._models.get((job.config.vlm, False), pytest.fail)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved[name]), name


def test_a_published_checkpoint_wants_its_own_images(resources: Resources, tmp_path: Path) -> None:
    folder = str(tmp_path)
    VisionLanguageModel(dataclasses.replace(VLM, **PUBLISHED_IMAGES)).save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        next(run_trial(Job(trial_id="t", config=CONFIG, checkpoint=folder), resources))
    place = f"does not fit the model in {folder}: set"
    assert caught.value.messages == (
        f"vlm.image_mean=(0.5, 0.5, 0.5) {place} vlm.image_mean=[0.0,0.0,0.0]",
        f"vlm.image_std=(0.5, 0.5, 0.5) {place} vlm.image_std=[1.0,1.0,1.0]",
        f'vlm.image_resampling=bicubic {place} vlm.image_resampling="bilinear"',
    )
    settings = [message.rpartition(" set ")[2] for message in caught.value.messages]
    overrides = parse_overrides(settings)
    fitting = build_config(Layer("base", config_values(CONFIG)), Layer("command line", overrides))
    next(run_trial(Job(trial_id="t", config=fitting, checkpoint=folder), resources))


def test_a_checkpoint_of_another_architecture(resources: Resources, tmp_path: Path) -> None:
    folder = str(tmp_path)
    other = dataclasses.replace(VLM, lm_n_blocks=2, vit_inter_dim=50)
    VisionLanguageModel(other).save_pretrained(folder)
    job = Job(trial_id="t", config=CONFIG, checkpoint=folder)
    with pytest.raises(UserError) as caught:
        next(run_trial(job, resources))
    assert caught.value.messages == (
        f"vlm.vit_inter_dim=128 does not fit the model in {folder}: set vlm.vit_inter_dim=50",
        f"vlm.lm_n_blocks=1 does not fit the model in {folder}: set vlm.lm_n_blocks=2",
    )
    VisionLanguageModel(
        dataclasses.replace(VLM, vit_inter_dim=128, lm_dropout=0.5)
    ).save_pretrained(folder)
    next(run_trial(job, resources))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100_000}, "batch_size"),
        ({"train_dataset_path": "/no/such/folder"}, "/no/such/folder"),
        ({"test_dataset_path": "/no/such/folder"}, "/no/such/folder"),
        ({"resume_from_vlm_checkpoint": True}, "checkpoints/nanoVLM-222M"),
        (
            {
                "vlm": dataclasses.replace(
                    VLM, vlm_load_backbone_weights=True, vit_model_type="/no/such/folder"
                )
            },
            "vlm.vit_model_type='/no/such/folder'",
        ),
        ({"lr_mp": 0.0, "lr_backbones": 0.0}, "together freeze the whole model"),
    ],
)
def test_what_cannot_be_used_is_said_before_training(
    resources: Resources, changes: dict[str, Any], message: str
) -> None:
    run(resources)  # a later trial meets warm resources: the checks must hold all the same
    with pytest.raises(UserError, match=message):
        run(resources, **changes)


def test_milestones_beyond_the_data(resources: Resources) -> None:
    with pytest.raises(UserError, match="within the full budget"):
        run(resources, milestones=(10**6,))


def test_no_validation_share_means_no_validation_loss(resources: Resources) -> None:
    assert "val_loss" not in run(resources, val_ratio=0.0)[-1].metrics


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_every_generator_is_seeded(resources: Resources, draw: Callable[[], float]) -> None:
    def drawn_in_trial() -> float:
        training = run_trial(Job(trial_id="t", config=CONFIG, milestones=(16,)), resources)
        next(training)
        number = draw()
        training.close()
        return number

    assert drawn_in_trial() == drawn_in_trial()


def test_a_second_trial_reads_no_model_and_starts_nothing(tmp_path: Path) -> None:
    VisionLanguageModel(VLM).save_pretrained(tmp_path)
    vlm = dataclasses.replace(VLM, vlm_checkpoint_path=str(tmp_path))
    resources = Resources("cpu")
    first = run(resources, vlm=vlm, resume_from_vlm_checkpoint=True)
    shutil.rmtree(tmp_path)
    worker = psutil.Process()
    # Python's threads: libraries start others of their own whenever they like.
    before = threading.enumerate(), worker.children(recursive=True)
    training = run_trial(
        Job(
            trial_id="t",
            config=dataclasses.replace(CONFIG, vlm=vlm, resume_from_vlm_checkpoint=True),
            milestones=(16,),
        ),
        resources,
    )
    next(training)
    assert (threading.enumerate(), worker.children(recursive=True)) == before
    last = list(training)[-1:]
    assert numbers(last) == numbers(first)
    assert (threading.enumerate(), worker.children(recursive=True)) == before


def test_reports_carry_the_notes_of_their_trial(resources: Resources) -> None:
    job = Job(trial_id="t", config=CONFIG, milestones=(16,))
    training = run_trial(job, resources)
    assert next(training).notes == ()
    resources.note("half of it")
    assert next(training).notes == ("half of it",)
    assert run(resources)[-1].notes == ()


WITHOUT_COMPILER = """
import dataclasses
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.trial import run_trial
from tests.test_trial import CONFIG
resources = Resources("cpu")
compiled, plain = (
    list(run_trial(Job(trial_id="t", config=dataclasses.replace(CONFIG, compile=c)), resources))[-1]
    for c in (True, False)
)
assert compiled.metrics == plain.metrics
assert plain.notes == ()
print(*compiled.notes, sep="\\n")
"""


@pytest.mark.slow
def test_without_a_compiler_a_trial_runs_uncompiled_and_says_so(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, check=True, capture_output=True
    )
    (note,) = answer.stdout.decode().splitlines()
    assert note.startswith("compile=true: InvalidCxxCompiler: No working C++ compiler found")
    assert note.endswith("; the model runs uncompiled")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_variants_than_torch_compiles_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit torch would run a trial uncompiled, which shows as fewer graphs.

    The limit is one of tracing, so what is traced need not become C++ code, which takes a minute.
    """
    resources = Resources("cpu")
    assert find_compile_obstacle("cpu") is None  # a graph too, the first time
    traced = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiled, "_compiled", functools.cache(traced))
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for freeze in ("none", "vision_encoder"):
            run(resources, compile=True, data_cutoff_idx=8, freeze=freeze)
    assert counters["stats"]["unique_graphs"] == before + 3  # the decoder, and two vision encoders


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_model_is_compiled_once() -> None:
    resources = Resources("cpu")
    eager = run(resources)
    compiled = run(resources, compile=True)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    run(resources, compile=True, seed=5, lr_mp=1e-2, weight_decay=0.1)
    assert numbers(run(resources, compile=True)) == numbers(compiled)
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert compiled[-1].metrics["val_loss"] == pytest.approx(eager[-1].metrics["val_loss"], 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trials_with_dropout_share_what_is_compiled() -> None:
    """And draw what uncompiled ones would draw for batches of these shapes: their losses agree."""
    resources = Resources("cpu")
    rates = ((0.1, 0.2), (0.05, 0.05), (0.15, 0.3), (0.2, 0.01), (0.1, 0.2))
    configs = [dataclasses.replace(VLM, vit_dropout=a, lm_dropout=b) for a, b in rates]
    first = run(resources, compile=True, vlm=configs[0])
    num_graphs = counters["stats"]["unique_graphs"]
    *others, again = [run(resources, compile=True, vlm=vlm) for vlm in configs[1:]]
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert numbers(again) == numbers(first)
    losses = [reports[-1].metrics["train_loss"] for reports in (first, *others)]
    eager = []
    for vlm in configs[:-1]:
        # The shapes of compiled code, without the compiler.
        resources.model(dataclasses.replace(CONFIG, vlm=vlm)).compiled = True
        eager.append(run(resources, vlm=vlm)[-1].metrics["train_loss"])
    assert losses == pytest.approx(eager, 1e-4)
    assert len({round(loss, 3) for loss in losses}) == len(losses)  # they do drop


def test_a_trial_that_is_watched_gives_the_same_numbers(resources: Resources) -> None:
    updates: list[ProgressUpdate] = []
    job = Job(trial_id="t", config=CONFIG, milestones=(20,))
    watched = list(run_trial(job, resources, on_update=updates.append))
    assert numbers(watched) == numbers(run(resources, milestones=(20,)))
    asked = [update for update in updates if update.stage == "evaluating"]
    assert [(p.step, p.samples_seen) for p in asked] == [(r.step, r.samples_seen) for r in watched]
    assert {(p.trial_id, p.total_samples) for p in updates} == {("t", watched[-1].samples_seen)}
    assert [p.train_loss for p in asked] == [r.metrics["train_loss"] for r in watched]


def trained_weights(
    resources: Resources, folder: Path, **changes: Any
) -> tuple[list[Report], dict[str, torch.Tensor]]:
    """Return the reports of a trial, and the weights of its model."""
    config = dataclasses.replace(CONFIG, **changes)
    trial = Job(trial_id="t", config=config, milestones=(32,), output_dir=str(folder))
    reports = list(run_trial(trial, resources))
    return reports, load_file(folder / "model.safetensors")


def test_a_learning_rate_of_0_keeps_one_backbone(resources: Resources, tmp_path: Path) -> None:
    initial = VisionLanguageModel(VLM, seed=CONFIG.seed).state_dict()
    _, weights = trained_weights(resources, tmp_path, lr_vision_backbone=0.0, max_steps=3)
    moved = {n.partition(".")[0] for n in weights if not torch.equal(weights[n], initial[n])}
    assert moved == {"MP", "decoder"}


def test_rates_of_their_own_change_nothing_where_they_equal_the_common_one(
    resources: Resources, tmp_path: Path
) -> None:
    """To the bit: the reports with their metrics, and the weights."""
    rates = {"lr_vision_backbone": 1e-3, "lr_language_backbone": 1e-3}
    common, weights = trained_weights(resources, tmp_path / "common")
    own, same = trained_weights(resources, tmp_path / "own", **rates)
    assert numbers(own) == numbers(common)
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    other, _ = trained_weights(resources, tmp_path / "other", lr_vision_backbone=1e-4)
    assert numbers(other) != numbers(common)


def test_max_steps_ends_a_trial(resources: Resources) -> None:
    first, last = run(resources, (32,), max_steps=5, epochs=3)
    assert (first.step, last.step, last.samples_seen, last.is_final) == (2, 5, 80, True)
