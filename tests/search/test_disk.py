"""The predicted disk: sizes against files that were written, and a disk that is too small."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.search.disk import DiskPeak, check_disk, disk_peak, max_paused_states

REPOSITORY = Path(__file__).parents[2]


def digits_space(tmp_path: Path, search: str = "lr_mp: default", **overrides: Any) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(f"preset: digits\nsearch: {{{search}}}")
    return load_space(path, overrides)


def peak(space: SearchSpace, concurrency: int = 1, num_trials: int = 10) -> DiskPeak:
    return disk_peak(space, num_trials=num_trials, concurrency=concurrency, num_questions=100)


def test_a_model_is_as_large_as_its_file(tmp_path: Path) -> None:
    space = digits_space(tmp_path)
    VisionLanguageModel(space.base.vlm).save_pretrained(tmp_path / "model")
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert peak(space).model == pytest.approx(written, rel=0.01)


def test_a_state_has_the_moments_of_what_is_trained(tmp_path: Path) -> None:
    trained, frozen = (
        peak(digits_space(tmp_path, freeze=freeze)) for freeze in ("none", "backbones")
    )
    assert trained.state - 2**20 == 3 * trained.model
    assert frozen.model < frozen.state - 2**20 < 1.2 * frozen.model


def test_the_largest_choice_counts(tmp_path: Path) -> None:
    searched = peak(digits_space(tmp_path, "freeze: default", freeze="backbones"))
    assert searched.state == peak(digits_space(tmp_path)).state


def test_a_learning_rate_of_0_leaves_out_moments(tmp_path: Path) -> None:
    def state(search: str = "weight_decay: default", **overrides: Any) -> int:
        return peak(digits_space(tmp_path, search, **overrides)).state

    everything, projector = state(), state(freeze="backbones")
    assert state(lr_vision_backbone=0.0) == state(freeze="vision_encoder") < everything
    assert state(lr_vision_backbone=0.0, lr_language_backbone=0.0) == projector
    without_decoder = state(lr_language_backbone=0.0)
    assert state(lr_vision_backbone=0.0) - projector == everything - without_decoder
    searched = "lr_vision_backbone: {choice: [0, 1e-4]}, lr_language_backbone: default"
    assert state(searched, lr_backbones=0.0, lr_language_backbone=1e-4) == everything
    searched = "lr_vision_backbone: {choice: [null, 0]}"
    assert state(searched) == everything
    assert state(searched, lr_backbones=0.0) == projector


def test_what_the_peak_grows_with(tmp_path: Path) -> None:
    one, four = (peak(digits_space(tmp_path), concurrency=c) for c in (1, 4))
    assert (one.states, four.states) == (2 * one.state, 8 * one.state)
    assert one.models == four.models == (3 + 1 + 8) * one.model
    unconfirmed: dict[str, Any] = {"confirm.top": 0}
    none = peak(digits_space(tmp_path, **unconfirmed))
    assert none.models == 2 * one.model
    assert peak(digits_space(tmp_path), num_trials=1000).models == one.models


def test_the_states_of_paused_trials_must_have_room_if_they_are_asked_for(tmp_path: Path) -> None:
    pausing: dict[str, Any] = {"scheduler.name": "asha", "scheduler.type": "pausing"}
    asked = digits_space(tmp_path, **(pausing | {"scheduler.max_paused": 4}))
    asked_peak = peak(asked)
    assert asked_peak.paused == 4 * asked_peak.state
    assert peak(asked, num_trials=3).paused == 3 * asked_peak.state
    assert max_paused_states(asked, asked_peak, room=0) == 4
    any_number = digits_space(tmp_path, **pausing)
    rest = peak(any_number)
    assert asked_peak.total - asked_peak.paused == rest.total and rest.paused == 0
    for left, num_states in ((11 * rest.state, 5), (rest.state, 0), (-1, 0)):
        assert max_paused_states(any_number, rest, rest.total + left) == num_states
    with pytest.raises(UserError, match=r"lower --concurrency, scheduler\.max_paused or confirm"):
        check_disk(replace(asked_peak, paused=2**60), tmp_path)


def test_a_disk_that_is_too_small_is_an_error(tmp_path: Path) -> None:
    small = DiskPeak(model=1, state=1, states=1, models=1, answers_and_logs=1)
    check_disk(small, tmp_path / "results" / "demo")
    huge = DiskPeak(model=1, state=1, states=2**60, models=1, answers_and_logs=1)
    with pytest.raises(UserError, match=r"--results: the search takes up to 1.07e\+09 GiB in"):
        check_disk(huge, tmp_path / "results" / "demo")


def test_what_a_search_holds_already_is_part_of_its_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovlm.search.disk.free_bytes", lambda folder: 10)
    needed = DiskPeak(model=1, state=1, states=100, models=0, answers_and_logs=0)
    with pytest.raises(UserError):
        check_disk(needed, tmp_path)
    (tmp_path / "model").write_bytes(b"0" * 90)
    check_disk(needed, tmp_path)


def test_with_several_objectives_the_models_of_a_front_have_room(tmp_path: Path) -> None:
    both: dict[str, Any] = {"objective": [{"metric": "mmstar_accuracy"}, {"metric": "val_loss"}]}
    found = peak(digits_space(tmp_path, **both), num_trials=90)
    assert found.models == (2 * 10 + 1 + 8) * found.model, "a ninth of them runs in full, or two"
    both["scheduler.name"] = "none"
    found = peak(digits_space(tmp_path, **both), num_trials=90)
    assert found.models == (90 + 1 + 8) * found.model
