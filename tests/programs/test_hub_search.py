"""The spaces that ship, run to their end on files in the hub's own formats.

Pretrained SigLIP and Llama, the_cauldron, MMStar and the tokenizer are small folders that
`tests/hub_data.py` writes; everything that reads them is what reads the published ones.
"""

import json
import math
from pathlib import Path

import pytest

from nanovlm.config_files import read_mapping
from nanovlm.models.vision_language_model import VisionLanguageModel
from tests.hub_data import AXES, write_hub
from tests.programs.conftest import REPOSITORY, Finished, run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALLER = (
    "epochs=1",
    "data_cutoff_idx=100",
    "batch_size=8",
    "search.batch_size={choice: [4, 8]}",
    "scheduler.rungs=2",
    "resources.gpus_per_worker=0",
    "resources.cpus_per_worker=1",
)


def search_space(name: str, folder: Path, *settings: str) -> Finished:
    """Run a space that ships on the tiny model and data in `folder`."""
    space = str(REPOSITORY / "search_spaces" / f"{name}.yaml")
    arguments = ("--space", space, f"preset={folder / 'hub' / 'tiny.yaml'}", "--concurrency", "1")
    return run_program("run_search.py", *arguments, *SMALLER, *settings, cwd=folder, name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub_search")
    write_hub(folder / "hub")
    return folder


@pytest.fixture(scope="module")
def lr_search(folder: Path) -> Finished:
    return search_space("lr", folder, "budget.trials=3")


def test_the_search_of_the_learning_rates_ends_well(lr_search: Finished) -> None:
    assert lr_search.code == 0, lr_search.output
    assert "Traceback" not in lr_search.output
    assert {record.state for record in lr_search.records} <= {"completed", "stopped"}
    assert sorted(record.number for record in lr_search.records) == [0, 1, 2]
    keys = {"lr_mp", "lr_backbones", "batch_size"}
    assert all(set(record.parameters) == keys for record in lr_search.records)


def test_every_report_has_all_metrics(lr_search: Finished) -> None:
    axes = {f"mmstar_accuracy/{category}/{axis}" for category in AXES for axis in AXES[category]}
    assert len(axes) == 18
    expected = axes | {f"mmstar_accuracy/{category}" for category in AXES}
    expected |= {"mmstar_accuracy", "mmstar_macro_accuracy", "val_loss", "train_loss"}
    for record in lr_search.records:
        for report in record.reports:
            assert expected <= set(report["metrics"])
            assert all(math.isfinite(value) for value in report["metrics"].values())


def test_long_turns_are_left_out(lr_search: Finished) -> None:
    """Of 100 rows, 10 are for validation; each of the other 90 has 2 or 3 turns that fit."""
    full = max(record.samples_seen for record in lr_search.records)
    assert 2 * 90 - 8 < full <= 3 * 90


def test_the_best_configuration_gives_the_same_numbers_alone(
    lr_search: Finished, folder: Path
) -> None:
    best = json.loads((lr_search.folder / "summary.json").read_text())["best"]
    single = run_program(
        "run_single.py", "--config", str(lr_search.folder / "best.yaml"), cwd=folder, name="again"
    )
    assert single.code == 0, single.output
    assert single.records[-1].metrics == best["metrics"]


def test_the_best_model_loads(lr_search: Finished) -> None:
    model = VisionLanguageModel.from_pretrained(lr_search.folder / "best")
    wanted = read_mapping(lr_search.folder / "best.yaml")["vlm"]
    assert model.config.lm_model_type == wanted["lm_model_type"]
    assert model.config.num_image_tokens == 4


def test_the_full_space_with_frozen_backbones_and_unshuffled_pixels(folder: Path) -> None:
    finished = search_space(
        "full",
        folder,
        "budget.trials=2",
        "freeze=backbones",
        "batch_size=4",
        "vlm.mp_pixel_shuffle_factor=1",
        "search.vlm.mp_pixel_shuffle_factor={choice: [1, 2], when: {batch_size: [4]}}",
    )
    assert finished.code == 0, finished.output
    assert "Traceback" not in finished.output
    first, second = sorted(finished.records, key=lambda record: record.number)
    assert first.state == "completed"
    assert first.parameters["freeze"] == "backbones"
    assert "lr_backbones" not in first.parameters
    assert first.parameters["vlm.mp_pixel_shuffle_factor"] == 1
    assert second.state in ("completed", "stopped"), second.reason
    assert second.parameters.keys() >= {"freeze", "lr_mp", "lr_schedule", "weight_decay"}
