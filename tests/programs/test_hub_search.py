"""The spaces that ship, run to their end on files in the hub's own formats.

Pretrained SigLIP and Llama, the_cauldron, MMStar and the tokenizer are small folders that
`tests/hub_data.py` writes; everything that reads them is what reads the published ones.
"""

import functools
import math
from pathlib import Path

import pytest

from nanovlm import cli
from nanovlm.cluster.recorder import RunOutcome
from nanovlm.config.sources import load_config, parse_overrides
from nanovlm.config.space import load_space
from nanovlm.config.yaml_text import read_mapping
from nanovlm.messages import Job
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.results.read import read_records
from nanovlm.search.plan import plan_search
from nanovlm.search.run import run_plan
from nanovlm.trial import run_trial
from tests.hub_data import AXES, write_hub
from tests.worker_threads import worker_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster")]

SPACES = Path(__file__).parents[2] / "search_spaces"

SMALLER = (
    "epochs=1",
    "data_cutoff_idx=100",
    "batch_size=8",
    "search.batch_size={choice: [4, 8]}",
    "scheduler.rungs=2",
    "resources.gpus_per_worker=0",
    "resources.cpus_per_worker=1",
    "confirm={top: 1, seeds: 1}",
)


def search_space(name: str, folder: Path, *settings: str) -> RunOutcome:
    """Run a space that ships on the tiny model and data in `folder`."""
    overrides = (f"preset={folder / 'hub' / 'tiny.yaml'}", *SMALLER, *settings)
    space = load_space(SPACES / f"{name}.yaml", parse_overrides(overrides), cli.start_layers)
    return run_plan(
        plan_search(space),
        folder / name,
        concurrency=1,
        start_workers=functools.partial(worker_threads, run_trial=run_trial),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub_search")
    write_hub(folder / "hub")
    return folder


@pytest.fixture(scope="module")
def lr_search(folder: Path) -> RunOutcome:
    return search_space("lr", folder, "budget.trials=3")


def test_the_search_of_the_learning_rates_ends_well(lr_search: RunOutcome) -> None:
    assert lr_search.summary["ended_by"] == "budget.trials: 3 trials are done"
    records = read_records(lr_search.folder)
    assert {record.state for record in records} <= {"completed", "stopped"}
    assert sorted(record.number for record in records) == [0, 1, 2]
    keys = {"lr_mp", "lr_backbones", "batch_size"}
    assert all(set(record.parameters) == keys for record in records)


def test_every_report_has_all_metrics(lr_search: RunOutcome) -> None:
    axes = {f"mmstar_accuracy/{category}/{axis}" for category in AXES for axis in AXES[category]}
    assert len(axes) == 18
    expected = axes | {f"mmstar_accuracy/{category}" for category in AXES}
    expected |= {"mmstar_accuracy", "mmstar_macro_accuracy", "val_loss", "train_loss"}
    for record in read_records(lr_search.folder):
        for report in record.reports:
            assert expected <= set(report.metrics)
            assert all(math.isfinite(value) for value in report.metrics.values())


def test_long_turns_are_left_out(lr_search: RunOutcome) -> None:
    """Of 100 rows, 10 are for validation; each of the other 90 has 2 or 3 turns that fit."""
    full = max(record.samples_seen for record in read_records(lr_search.folder))
    assert 2 * 90 - 8 < full <= 3 * 90


def test_the_best_configuration_gives_the_same_numbers_without_ray(lr_search: RunOutcome) -> None:
    config = load_config(lr_search.folder / "best.yaml", None, {})
    *_, last = run_trial(Job(trial_id="again", config=config), Resources("cpu"))
    assert last.metrics == lr_search.summary["best"]["metrics"]


def test_the_best_model_loads(lr_search: RunOutcome) -> None:
    model = VisionLanguageModel.from_pretrained(lr_search.folder / "best")
    wanted = read_mapping(lr_search.folder / "best.yaml")["vlm"]
    assert model.config.lm_model_type == wanted["lm_model_type"]
    assert model.config.num_image_tokens == 4


def test_the_full_space_with_frozen_backbones_and_unshuffled_pixels(folder: Path) -> None:
    outcome = search_space(
        "full",
        folder,
        "budget.trials=2",
        "freeze=backbones",
        "batch_size=4",
        "vlm.mp_pixel_shuffle_factor=1",
        "search.vlm.mp_pixel_shuffle_factor={choice: [1, 2], when: {batch_size: [4]}}",
    )
    first, second = sorted(read_records(outcome.folder), key=lambda record: record.number)
    assert {first.state, second.state} == {"completed", "stopped"}, second.reason
    assert first.parameters["freeze"] == "backbones"
    assert "lr_backbones" not in first.parameters
    assert first.parameters["vlm.mp_pixel_shuffle_factor"] == 1
    assert second.parameters.keys() >= {"freeze", "lr_mp", "lr_schedule", "weight_decay"}
