"""A trial that was cut off goes on as if it had not been: every number, to the bit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovlm.messages import Job, Report
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.training.optim import build_optimizer
from nanovlm.training.state import (
    STATE_FILE,
    SavedTrial,
    collect_tensors,
    read_state,
    restore_tensors,
    write_state,
)
from nanovlm.trial import _belongs_to, run_trial
from tests.devices import CUDA
from tests.tiny import digits_config, vlm_config

VLM = vlm_config(
    vit_hidden_dim=32, lm_hidden_dim=32, lm_inter_dim=64, vit_dropout=0.1, lm_dropout=0.2
)
CONFIG = digits_config(
    VLM, lr_mp=1e-3, lr_backbones=1e-3, batch_size=16, mmstar_batch_size=128, seed=1
)
MILESTONES = (32, 64)


@pytest.fixture(scope="module")
def resources() -> Resources:
    return Resources("cpu")


def job(folder: Path, **changes: Any) -> Job:
    milestones = changes.pop("milestones", MILESTONES)
    return Job(
        trial_id="t",
        config=dataclasses.replace(CONFIG, **changes),
        milestones=milestones,
        state_dir=str(folder / "state"),
        output_dir=str(folder / "model"),
    )


def run(trial: Job, resources: Resources, num_reports: int | None = None) -> list[Report]:
    """Run a trial, or kill it after so many reports."""
    reports = []
    running = run_trial(trial, resources)
    for report in running:
        reports.append(report)
        if len(reports) == num_reports:
            running.close()
            break
    return reports


def numbers(reports: list[Report]) -> list[Any]:
    return [(r.samples_seen, r.step, r.is_final, r.metrics) for r in reports]


def assert_goes_on(
    tmp_path: Path, resources: Resources, num_reports: int, changes: dict[str, Any]
) -> None:
    """Kill a trial after so many reports; what then goes on must equal one that was not killed."""
    whole = run(job(tmp_path / "whole", **changes), resources)
    parts = job(tmp_path / "parts", **changes)
    first = run(parts, resources, num_reports)
    run(job(tmp_path / "other", seed=5), resources, 1)  # leaves other weights and moments behind
    again = run(parts, resources)
    assert again[:num_reports] == first, "the reports before are made again as they were"
    assert numbers(again) == numbers(whole)
    assert again[-1].seconds > first[-1].seconds
    if len(again) > num_reports:
        assert first[-1].seconds < again[-1].first_step_seconds < again[-1].seconds
    models = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr_mp": 0.0},
        {"freeze": "vision_encoder"},
        {"max_steps": 6, "lr_vision_backbone": 1e-4, "epochs": 2},
    ],
)
@pytest.mark.parametrize("num_reports", [1, 2])
def test_a_trial_goes_on_from_its_last_report(
    tmp_path: Path, resources: Resources, num_reports: int, changes: dict[str, Any]
) -> None:
    assert_goes_on(tmp_path, resources, num_reports, changes)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trial_on_a_gpu_goes_on_from_its_last_report(tmp_path: Path, compiled: bool) -> None:
    """To the bit, in bfloat16 and with dropout."""
    assert_goes_on(tmp_path, Resources(CUDA), num_reports=1, changes={"compile": compiled})


def test_a_trial_that_goes_on_trains_only_what_is_left(
    tmp_path: Path, resources: Resources
) -> None:
    run(job(tmp_path), resources, 2)
    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        return False

    reports = list(run_trial(job(tmp_path), resources, count))
    assert steps == reports[-1].step - reports[1].step


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_mp": 2e-3}, "lr_mp"),
        ({"epochs": 2}, "epochs"),
        ({"milestones": (32,)}, "milestones"),
        ({"max_steps": 6}, "max_steps"),
        ({"lr_language_backbone": 2e-3}, "lr_language_backbone"),
    ],
)
def test_the_state_of_another_trial_is_not_used(
    tmp_path: Path, resources: Resources, changes: dict[str, Any], named: str
) -> None:
    run(job(tmp_path), resources, 1)
    begun = run(job(tmp_path, **changes), resources, 1)[0]
    assert any(note.endswith(f"of a trial with other {named}") for note in begun.notes)
    assert not run(job(tmp_path / "fresh", **changes), resources, 1)[0].notes
    assert run(job(tmp_path, **changes), resources, 1) == [begun], "now there is its own state"


def test_a_state_that_cannot_be_read_starts_the_trial_over(
    tmp_path: Path, resources: Resources
) -> None:
    first = run(job(tmp_path), resources, 1)
    path = tmp_path / "state" / STATE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    again = run(job(tmp_path), resources)
    assert "cannot be read" in again[0].notes[-1]
    assert numbers(again)[0] == numbers(first)[0]


def test_a_kill_while_the_state_is_written_leaves_the_old_one(
    tmp_path: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(job(tmp_path / "whole"), resources)
    run(job(tmp_path), resources, 1)

    def die(tensors: Any, part: Path, about: Any) -> None:
        part.write_bytes(b"the first half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanovlm.training.state.save_file", die)
        with pytest.raises(KeyboardInterrupt):
            run(job(tmp_path), resources)
    assert numbers(run(job(tmp_path), resources)) == numbers(whole)


def test_a_worker_that_outlived_its_program_does_not_set_the_state_back(
    tmp_path: Path, resources: Resources
) -> None:
    run(job(tmp_path), resources, 1)
    left = shutil.copytree(tmp_path, tmp_path / "left")  # as the old worker has it in memory
    run(job(tmp_path), resources, 2)
    further = (tmp_path / "state" / STATE_FILE).read_bytes()
    (old,) = run(job(left), resources, 1)
    saved = read_state(left / "state", _belongs_to(job(left)))
    assert isinstance(saved, SavedTrial)
    write_state(tmp_path / "state", saved.training, [old], _belongs_to(job(tmp_path)))
    assert (tmp_path / "state" / STATE_FILE).read_bytes() == further


def test_no_state_is_written_for_the_final_report(tmp_path: Path, resources: Resources) -> None:
    run(job(tmp_path, milestones=()), resources)
    assert not (tmp_path / "state").exists()


LATER_KEYS = ("lr_vision_backbone", "lr_language_backbone", "max_steps")


def test_a_state_from_before_the_backbones_had_rates_of_their_own_goes_on(
    tmp_path: Path, resources: Resources
) -> None:
    """Such a state lacks the keys, and its numbers of parameters count through two groups."""
    whole = run(job(tmp_path / "whole"), resources)
    parts = job(tmp_path / "parts")
    run(parts, resources, 1)
    belongs_to = _belongs_to(parts)
    saved = read_state(tmp_path / "parts" / "state", belongs_to)
    assert isinstance(saved, SavedTrial)
    before = {key: value for key, value in belongs_to.items() if key not in LATER_KEYS}
    (tmp_path / "parts" / "state" / STATE_FILE).unlink()
    write_state(tmp_path / "parts" / "state", saved.training, saved.reports, before)
    again = run(parts, resources)
    assert not again[-1].notes and numbers(again) == numbers(whole)


def test_the_moments_of_two_groups_reach_their_parameters() -> None:
    model = VisionLanguageModel(VLM, seed=0)
    named = dict(model.named_parameters())
    groups = [
        [p for name, p in named.items() if name.startswith("MP.") == is_mp]
        for is_mp in (True, False)
    ]
    before = torch.optim.AdamW([{"params": group} for group in groups], fused=True)
    for number, parameter in enumerate(named.values()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    before.step()
    tensors = {name: tensor.clone() for name, tensor in collect_tensors(model, before).items()}
    after = build_optimizer(model, CONFIG)
    assert len(after.param_groups) == 3
    restore_tensors(tensors, model, after)
    for parameter in named.values():
        torch.testing.assert_close(after.state[parameter], before.state[parameter], rtol=0, atol=0)
