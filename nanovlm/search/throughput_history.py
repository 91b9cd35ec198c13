"""How fast trials like those of a space were, by the reports of earlier searches."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace
from nanovlm.files import user_path
from nanovlm.messages import TrialRecord
from nanovlm.results.read import (
    RUNGS_FILE,
    SPACE_FILE,
    STUDY_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    FolderReader,
)

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
class Throughput:
    """Medians over the reports of earlier trials."""

    samples_per_second: float
    """Of one trial, all its workers together."""
    evaluation_seconds: float
    """Of one report."""
    folders: tuple[Path, ...]
    """The results folders that have such reports."""


@dataclass(frozen=True)
class ThroughputHistory:
    """What the results folders say of the speed."""

    speed: Throughput | None
    """None if no report of such a search has a speed."""
    left_out: tuple[str, ...]
    """Why folders could not be asked: what in them is damaged."""


def past_speed(space: SearchSpace, results: Path) -> ThroughputHistory:
    """Return how fast such trials were in the folders of `results` and of `warm_start`.

    A folder counts if its space has the same model, data, benchmark, settings of execution and
    resources of a trial. Which GPU it was, no results folder says: the caller names the folders.
    """
    speeds: list[float] = []
    evaluations: list[float] = []
    folders = []
    left_out: list[str] = []
    wanted = _work(config_values(space.base), space.resources.model_dump())
    for folder in _searches(results, space.warm_start):
        reader = FolderReader(folder)
        records = _fitting(reader, wanted)
        left_out += reader.problems
        reports = [report for record in records for report in record.reports]
        measured = [(report, report.speed) for report in reports if report.speed]
        if measured:
            speeds += [speed.samples_per_second for _, speed in measured]
            evaluations += [report.evaluation_seconds for report, _ in measured]
            folders.append(folder)
    if not speeds:
        return ThroughputHistory(None, tuple(left_out))
    speed = Throughput(statistics.median(speeds), statistics.median(evaluations), tuple(folders))
    return ThroughputHistory(speed, tuple(left_out))


def _fitting(reader: FolderReader, wanted: Mapping[str, Any]) -> list[TrialRecord]:
    """Return the trials of a folder whose space makes the wanted work."""
    content = reader.config(SPACE_FILE) or {}
    base, resources = content.get("base"), content.get("resources")
    is_whole = (
        isinstance(base, Mapping)
        and isinstance(resources, Mapping)  # they stand last
        and resources.keys() >= wanted["resources"].keys()
    )
    if content and not is_whole:
        reader.problems.append(f"{reader.folder / SPACE_FILE}: is cut, or no search wrote it")
    if not reader.problems and _work(base or {}, resources) == wanted:
        records, _ = reader.ended()
        return [] if reader.problems else records
    return []


def _searches(results: Path, warm_start: Iterable[str]) -> list[Path]:
    """Return the results folders of searches that hold trials, each once."""
    found = [*map(user_path, warm_start), *sorted(results.glob("*/"))]
    marks = (SPACE_FILE, RUNGS_FILE, STUDY_FILE)
    searches = [f.resolve() for f in found if FolderReader(f).has(*marks)]
    return [f for f in dict.fromkeys(searches) if FolderReader(f).has(TRIALS_FILE, SUMMARY_FILE)]


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
