"""How fast trials like those of a space were, by the reports of earlier searches."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.config_files import config_values
from nanovlm.results.store import SPACE_FILE, TRIALS_FILE, read_records
from nanovlm.search.space import SearchSpace
from nanovlm.yaml_text import read_mapping

_SAME_WORK = ("train_dataset_path", "train_dataset_name", "turns", "compile", "cpu_threads", "vlm")
"""Keys of the configuration that the time of a sample depends on, and that all trials share."""

_SAME_QUESTIONS = ("test_dataset_path", "mmstar_batch_size", "mmstar_holdout", "mmstar_part")
"""And those of an evaluation."""

_NO_WORK = (
    "vlm_checkpoint_path",
    "vlm_load_backbone_weights",
    "vit_dropout",
    "lm_dropout",
    "stall_minutes",
)


@dataclass(frozen=True)
class PastSpeed:
    """Medians over the reports of earlier trials."""

    samples_per_second: float
    """Of one trial, all its workers together."""
    evaluation_seconds: float
    """Of one report."""
    folders: tuple[Path, ...]
    """The results folders that have such reports."""


def past_speed(space: SearchSpace, results: Path) -> PastSpeed | None:
    """Return how fast such trials were in the folders of `results` and of `warm_start`.

    A folder counts if its space has the same model, data, benchmark, settings of execution and
    resources of a trial. Which GPU it was, no results folder says: the caller names the folders.
    None if no report of such a search has a speed.
    """
    speeds: list[float] = []
    evaluations: list[float] = []
    folders = []
    wanted = _work(config_values(space.base), space.resources.model_dump())
    for folder in _searches(results, space.warm_start):
        content = read_mapping(folder / SPACE_FILE)
        if _work(content.get("base", {}), content.get("resources")) != wanted:
            continue
        reports = [report for record in read_records(folder) for report in record.reports]
        measured = [(report, report.speed) for report in reports if report.speed]
        if measured:
            speeds += [speed.samples_per_second for _, speed in measured]
            evaluations += [report.evaluation_seconds for report, _ in measured]
            folders.append(folder)
    if not speeds:
        return None
    return PastSpeed(statistics.median(speeds), statistics.median(evaluations), tuple(folders))


def _searches(results: Path, warm_start: Iterable[str]) -> list[Path]:
    """Return the results folders that hold trials, each once."""
    found = [*map(Path, warm_start), *sorted(results.glob("*/"))]
    searches = [f.resolve() for f in found if (f / SPACE_FILE).exists()]
    return [f for f in dict.fromkeys(searches) if (f / TRIALS_FILE).exists()]


def _work(config: Mapping[str, Any], resources: Any) -> dict[str, Any]:
    """Return what the time of a trial's samples and evaluations depends on."""
    work = {key: _plain(config.get(key)) for key in (*_SAME_WORK, *_SAME_QUESTIONS)}
    return work | {"resources": _plain(resources)}


def _plain(value: Any) -> Any:
    """Return a value of a configuration without what makes no work, and lists for tuples."""
    if isinstance(value, str):
        return value.partition("@")[0]  # a version of the same data set
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items() if key not in _NO_WORK}
    return list(value) if isinstance(value, tuple) else value
