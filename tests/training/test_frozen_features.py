"""A frozen vision encoder's output on the disk: the same numbers as without, computed once."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.data import cache
from nanovlm.data.cache import FEATURES_FILE, delete, prepared_folders
from nanovlm.errors import UserError
from nanovlm.messages import BuildProgress, Job, Report
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.models.vision_transformer import ViT
from nanovlm.resources import Resources
from nanovlm.training import frozen_features
from nanovlm.trial import run_trial
from tests.tiny import digits_config, vlm_config

CONFIG = digits_config(freeze="vision_encoder", cache_vision_features=True, batch_size=16)
WITHOUT = dataclasses.replace(CONFIG, cache_vision_features=False)


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(library: str, **parts: str) -> Path:
        (tmp_path / library).mkdir(exist_ok=True)
        return tmp_path / library

    monkeypatch.setattr(cache, "cached_assets_path", folder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many images the encoder has read each time, as it goes on."""
    numbers: list[int] = []
    forward = ViT.forward

    def counting(self: ViT, image: torch.Tensor) -> torch.Tensor:
        numbers.append(len(image))
        return forward(self, image)

    monkeypatch.setattr(ViT, "forward", counting)
    return numbers


def run(config: TrainConfig, resources: Resources | None = None) -> list[Report]:
    job = Job(number=0, trial_id="0", config=config, milestones=(16, 96), parameters={})
    return list(run_trial(job, resources or Resources("cpu")))


def feature_folders() -> list[Path]:
    return [f.path for f in prepared_folders() if f.about["what"] == "vision features"]


def metrics(reports: list[Report]) -> list[dict[str, float]]:
    return [dict(report.metrics) for report in reports]


def test_trials_compute_the_same_numbers_from_it(encoded: list[int]) -> None:
    """Losses, validation loss and letter probabilities; to 1e-6 in float32."""
    cached, computed = metrics(run(CONFIG)), metrics(run(WITHOUT))
    assert len(cached) == len(computed) > 1
    for ours, theirs in zip(cached, computed, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_each_image_is_encoded_once_whoever_wants_it(encoded: list[int]) -> None:
    """By epochs, trials, evaluations, and another worker; only another encoder begins anew."""
    resources = Resources("cpu")
    first = metrics(run(CONFIG, resources))
    num_images = sum(encoded)
    assert num_images == 20 + len(resources.benchmark(CONFIG).images)
    assert max(encoded) == frozen_features.BLOCK
    again = dataclasses.replace(CONFIG, freeze="backbones", lr_mp=1e-4)
    run(again, resources)
    assert metrics(run(CONFIG, resources)) == metrics(run(CONFIG)) == first
    assert sum(encoded) == num_images
    run(dataclasses.replace(CONFIG, seed=1), resources)
    assert sum(encoded) == 2 * num_images
    assert len(feature_folders()) == 4


def test_it_serves_only_frozen_encoders(encoded: list[int]) -> None:
    run(dataclasses.replace(CONFIG, freeze="none"))
    assert not feature_folders()
    run(dataclasses.replace(CONFIG, freeze="none", lr_vision_backbone=0.0))
    assert len(feature_folders()) == 2


def test_with_dropout_in_the_encoder_it_says_so() -> None:
    reports = run(dataclasses.replace(CONFIG, vlm=vlm_config(vit_dropout=0.1)))
    assert not feature_folders()
    [note] = reports[-1].notes
    assert note.startswith("cache_vision_features: vlm.vit_dropout=0.1 makes other features")


def test_a_killed_build_goes_on_where_it_was(
    encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what is safe on the disk; what was written behind it is written again."""
    monkeypatch.setattr(frozen_features, "_BLOCKS_PER_NOTE", 1)
    expected = metrics(run(CONFIG))
    whole = {path.name: (path / FEATURES_FILE).read_bytes() for path in feature_folders()}
    for folder in prepared_folders():
        if folder.about["what"] == "vision features":
            delete(folder)
    num_images = sum(encoded)
    encoded.clear()

    class Killed(Exception):
        pass

    def kill(progress: BuildProgress) -> None:
        if progress.what == frozen_features.WHAT and progress.done == 96:
            for path in feature_folders():
                if not (path / "manifest.json").exists():
                    with (path / FEATURES_FILE).open("ab") as file:
                        file.write(b"half a block")
            raise Killed

    with pytest.raises(Killed):
        run(CONFIG, Resources("cpu", on_progress=kill))
    assert metrics(run(CONFIG)) == expected
    assert sum(encoded) == num_images
    assert {p.name: (p / FEATURES_FILE).read_bytes() for p in feature_folders()} == whole


def test_a_full_disk_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_features, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"cache_vision_features: the features take .* MiB in "):
        run(CONFIG)


def test_a_damaged_file_is_told() -> None:
    run(CONFIG)
    path = feature_folders()[0] / FEATURES_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{FEATURES_FILE}: is damaged or missing: must have"):
        run(CONFIG)


def test_the_encoder_is_known_by_its_weights() -> None:
    first, second = (VisionLanguageModel(CONFIG.vlm, seed=seed) for seed in (0, 0))
    assert frozen_features.encoder_digest(first) == frozen_features.encoder_digest(second)
    with torch.no_grad():
        second.vision_encoder.layer_norm.bias[0] += 1e-7
    assert frozen_features.encoder_digest(first) != frozen_features.encoder_digest(second)
