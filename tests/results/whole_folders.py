"""Results folders with every file that a search and a single run write, for tests that damage them.

make_whole_search(tmp_path / "search")
make_whole_single(tmp_path / "single")
"""

from pathlib import Path
from typing import Any

import torch

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.config.yaml_text import write_yaml
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.results.folder import describe_environment
from nanovlm.results.read import CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, SPACE_FILE
from nanovlm.results.retention import state_dir
from nanovlm.results.write import ResultsStore
from nanovlm.search.searcher import StudySearch
from nanovlm.training.state import TrainingState, write_state
from nanovlm.watch.observer import RunStart
from nanovlm.watch.report.page import write_report
from nanovlm.watch.tensorboard import TensorBoardLogs
from tests.records import make_record, make_report
from tests.results.answers import write_answers
from tests.results.fake_records import DATA, MILESTONES, NUM_ITEMS, make_results
from tests.tiny import VLM, digits_config

OBJECTIVE = Objective(metric="mmstar_accuracy", mode="max")
DATA_MADE: dict[str, Any] = {
    "training": {**DATA["training"], "folder": "/cache/1"},  # type: ignore[dict-item]
    "benchmark": {**DATA["benchmark"], "folder": "/cache/2"},  # type: ignore[dict-item]
}
"""The content of `data.json`."""
NUM_TRIALS = 8
REPORTS = [make_report(1000, {"mmstar_accuracy": 0.5})]
"""Of the trial that is paused."""
SINGLE_CONFIG = digits_config()


def make_whole_search(folder: Path) -> Path:
    """Make the folder of a search that has ended, with a trial that is paused; return it."""
    make_results(folder, num_trials=NUM_TRIALS)
    space = load_space(folder / SPACE_FILE)
    store = ResultsStore(folder, OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=True):
        assert store.best is not None
        write_model(folder / "checkpoints" / store.best.trial_id)
        write_model(folder / "best")
        store.write_json(DATA_FILE, DATA_MADE)
        store.write_json(ENVIRONMENT_FILE, describe_environment())
        searcher = StudySearch(space, folder, 1, StopSwitch(), MILESTONES, store.records)
        searcher.suggest("tune-id")
        _write_state(folder, f"trial-{NUM_TRIALS:04d}")
        store.take(make_record(NUM_TRIALS, "paused", reports=REPORTS))
        for record in (*store.records, *store.confirmed):
            right = round(record.metrics.get("mmstar_accuracy", 0.0) * NUM_ITEMS)
            if record.state == "completed":
                answers = {index: index < right for index in range(NUM_ITEMS)}
                write_answers(folder / "answers" / f"{record.trial_id}.jsonl", answers)
        _write_tensorboard(folder, space, store)
        (folder / "wandb").mkdir()
        (folder / "wandb" / "search-id").write_text("0123abcd")
        (folder / "wandb" / "finished-trials").write_text("trial-0000\n")
        (folder / "logs" / "driver.log").write_text("2026 something\n")
        store.close(600.0, "budget.trials: all trials are done")
    write_report(folder)
    return folder


def make_whole_single(folder: Path) -> Path:
    """Make the folder of a single run that was interrupted; return it."""
    store = ResultsStore(folder, OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=False):
        store.begin()
        store.write_text(CONFIG_FILE, write_yaml(config_values(SINGLE_CONFIG)))
        store.write_json(DATA_FILE, DATA_MADE)
        store.write_json(ENVIRONMENT_FILE, describe_environment())
        _write_state(folder, "trial-0000")
        (folder / "logs" / "driver.log").write_text("2026 something\n")
        store.close(60.0, "interrupted")
    return folder


def write_model(folder: Path) -> None:
    """Write a tiny model."""
    torch.manual_seed(0)
    VisionLanguageModel(VLM).save_pretrained(folder)


def _write_state(folder: Path, trial_id: str) -> None:
    state = TrainingState(
        step=10,
        loss_sum=1.0,
        loss_weight=1.0,
        micro_batch_limit=None,
        random=(torch.zeros(4, dtype=torch.uint8),),
        tensors={"model.weight": torch.zeros(3)},
    )
    write_state(state_dir(folder, trial_id), state, REPORTS, STATE_BELONGS_TO)


STATE_BELONGS_TO = {"config": {"lr_mp": 0.1}}


def _write_tensorboard(folder: Path, space: SearchSpace, store: ResultsStore) -> None:
    logs = TensorBoardLogs()
    logs.begin(
        RunStart(
            folder=folder,
            config=space.base,
            space=space,
            objective=OBJECTIVE,
            milestones=MILESTONES,
            trial_samples=9000,
            data=DATA_MADE,
            records=tuple(store.records[:2]),
        )
    )
    logs.end({})
    assert logs.problem is None
    assert len([*(folder / "tensorboard").iterdir()]) == 2
