"""Reads a results folder for its report, as far as it can be read.

What is missing or broken is not an error here: it is said in the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import summarize_confirmation
from nanovlm.results.environment import ENVIRONMENT_FILE
from nanovlm.results.store import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    CONFIG_FILE,
    CONFIRM_FILE,
    DATA_FILE,
    SPACE_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    salvage_records,
)
from nanovlm.results.summary import best_record, final_best, summarize
from nanovlm.results.verdict import DEFAULT_NUMBER
from nanovlm.search.parameter import Parameter
from nanovlm.search.sections import Objective
from nanovlm.search.space import SearchSpace, load_space

RUNGS_FILE = "rungs.jsonl"

_WATCHED = (TRIALS_FILE, CONFIRM_FILE, RUNGS_FILE, SUMMARY_FILE, SPACE_FILE, CONFIG_FILE)
_MARKS_OF_A_SEARCH = (SPACE_FILE, RUNGS_FILE, CONFIRM_FILE, "study.id", "study.journal")
_LOG_RATIO = 50
"""Without a space file: positive values that span more than this are shown on a log scale."""


@dataclass(frozen=True, kw_only=True)
class SearchFolder:
    """What there is to report of a search or a single run."""

    folder: Path
    objective: Objective
    records: Sequence[TrialRecord]
    """Of the ended trials, in the order of their end."""
    confirmed: Sequence[TrialRecord]
    """Of the ended confirming runs."""
    verdicts: Sequence[Mapping[str, Any]]
    """Lines of `rungs.jsonl`, those of withdrawn trials left out."""
    space: SearchSpace | None
    summary: Mapping[str, Any]
    """As in `summary.json`, but counted anew from the records."""
    confirmation: Mapping[str, Any] | None
    """As in `summary.json`; what the confirming runs come to."""
    best: TrialRecord | None
    """The run that `best.yaml` and `best/` are of."""
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    missing: Sequence[str]
    """What is missing or cannot be read, in a sentence each."""
    parameters: Sequence[Parameter]
    """The searched keys; without a space file guessed from the trials."""
    is_search: bool
    """Whether it is more than a single run."""
    changed_at: float
    """When a file of the results was last written, in seconds since 1970."""
    by_number: Mapping[int, TrialRecord] = field(default_factory=dict)
    """The trials by their number."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def metric(self) -> str:
        return self.objective.metric

    @property
    def ended_by(self) -> str | None:
        """Why it is over; None if that was never written down."""
        ended_by: str | None = self.summary["ended_by"]
        return ended_by

    @property
    def best_trial(self) -> TrialRecord | None:
        """The trial of the search whose configuration is the best."""
        if self.best is not None and self.best.number in self.by_number:
            return self.by_number[self.best.number]
        return best_record(self.records, self.objective)

    @property
    def default(self) -> TrialRecord | None:
        """The trial of the base configuration, if it has ended."""
        return self.by_number.get(DEFAULT_NUMBER)

    @property
    def devices(self) -> tuple[str, float]:
        """What a trial occupies: `GPU` and how many, or `worker` where there is none."""
        if self.space is None:
            return "worker", 1.0
        gpus = self.space.resources.gpus_per_trial
        return ("GPU", gpus) if gpus else ("worker", float(self.space.resources.workers))

    @property
    def milestones(self) -> list[int]:
        """Samples seen at which trials were compared."""
        return sorted({verdict["milestone"] for verdict in self.verdicts})

    @property
    def best_config_file(self) -> Path | None:
        path = self.folder / BEST_CONFIG_FILE
        return path if path.exists() else None


def read_search(folder: Path) -> SearchFolder:
    """Return what can be read of a results folder.

    Raises:
        UserError: there is no such folder, or it holds nothing of a search or a single run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a results folder: no such folder")
    if not any((folder / name).exists() for name in _WATCHED):
        names = ", ".join(_WATCHED)
        raise UserError(f"{folder}: holds no results of a search: none of {names}")
    reader = _Reader(folder)
    records = reader.records(TRIALS_FILE)
    confirmed = reader.records(CONFIRM_FILE)
    space = reader.space()
    summary = reader.mapping(SUMMARY_FILE, _SUMMARY_FIELDS)
    is_search = len(records) > 1 or any((folder / f).exists() for f in _MARKS_OF_A_SEARCH)
    if is_search and space is None and not (folder / SPACE_FILE).exists():
        reader.missing.append(
            f"{SPACE_FILE} is not there: scales are guessed from the values of the trials"
        )
    objective = _objective(summary, space)
    confirmation = reader.confirmation(confirmed, records, objective)
    return SearchFolder(
        folder=folder,
        objective=objective,
        records=records,
        confirmed=confirmed,
        verdicts=_standing(reader.lines(RUNGS_FILE)),
        space=space,
        summary=_count_anew(folder, summary, records, confirmed, objective, space),
        confirmation=confirmation or summary.get("confirmation"),
        best=final_best(records, objective, confirmed, confirmation),
        data=reader.mapping(DATA_FILE, ("training", "benchmark")),
        environment=reader.mapping(ENVIRONMENT_FILE, (), is_optional=True),
        missing=tuple(reader.missing),
        parameters=space.parameters if space else _guess_parameters(records),
        is_search=is_search,
        changed_at=max(
            (folder / name).stat().st_mtime for name in _WATCHED if (folder / name).exists()
        ),
        by_number={record.number: record for record in records},
    )


_SUMMARY_FIELDS = ("objective", "wall_seconds", "gpu_hours")


class _Reader:
    """Reads files, and keeps in mind what is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: list[str] = []

    def records(self, name: str) -> list[TrialRecord]:
        if name == TRIALS_FILE and not (self.folder / name).exists():
            self.missing.append(f"{name} is not there: no trial has ended, or the file is lost")
        records, problems = salvage_records(self.folder / name)
        self.missing += problems
        return records

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a file of JSON lines that can be read."""
        path = self.folder / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [_parse(line) for line in text.splitlines() if line.strip()]
        if None in found:
            self.missing.append(f"{name}: {found.count(None)} of {len(found)} lines are broken")
        return [line for line in found if line is not None]

    def mapping(
        self, name: str, fields: Sequence[str], *, is_optional: bool = False
    ) -> dict[str, Any]:
        """Return the content of a JSON file; nothing if it is missing, cut or lacks a field."""
        path = self.folder / name
        if not path.exists():
            if not is_optional:
                self.missing.append(f"{name} is not there")
            return {}
        content = _parse(path.read_text(encoding="utf-8", errors="replace"))
        if content is None or not all(name in content for name in fields):
            self.missing.append(f"{name} cannot be read: it is cut or not of this program")
            return {}
        return content

    def confirmation(
        self,
        confirmed: Sequence[TrialRecord],
        records: Sequence[TrialRecord],
        objective: Objective,
    ) -> dict[str, Any] | None:
        """Return what the confirming runs come to; by their seeds alone if answers are broken."""
        answers = self.folder / ANSWERS_DIR
        lost = [
            run.trial_id
            for run in confirmed
            if run.state == "completed" and not (answers / f"{run.trial_id}.jsonl").exists()
        ]
        if lost:
            self.missing.append(f"{ANSWERS_DIR}/ lacks {', '.join(lost)}: compared by seeds alone")
        try:
            return summarize_confirmation(confirmed, records, objective, answers)
        except UserError as error:
            self.missing += [f"{message}: compared by seeds alone" for message in error.messages]
            nowhere = self.folder / ANSWERS_DIR / "-"
            return summarize_confirmation(confirmed, records, objective, nowhere)

    def space(self) -> SearchSpace | None:
        path = self.folder / SPACE_FILE
        if not path.exists():
            return None
        try:
            return load_space(path)
        except UserError as error:
            self.missing.append(f"{SPACE_FILE} cannot be read: {error.messages[0]}")
            return None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _standing(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the verdicts, without those of trials that failed and were withdrawn."""
    withdrawn = {line["withdrawn"] for line in lines if "withdrawn" in line}
    fields = {"number", "milestone", "samples_seen", "value", "goes_on"}
    verdicts = [line for line in lines if fields <= line.keys()]
    return [verdict for verdict in verdicts if verdict["number"] not in withdrawn]


def _objective(summary: Mapping[str, Any], space: SearchSpace | None) -> Objective:
    if summary:
        return Objective(**summary["objective"])
    if space:
        return space.objective
    return Objective(metric="mmstar_accuracy", mode="max")


def _count_anew(
    folder: Path,
    summary: Mapping[str, Any],
    records: Sequence[TrialRecord],
    confirmed: Sequence[TrialRecord],
    objective: Objective,
    space: SearchSpace | None,
) -> dict[str, Any]:
    """Return the summary of the records that there are; the file may be older, or gone."""
    everything = [*records, *confirmed]
    ended = [record.ended_at for record in everything if record.ended_at]
    span = max(ended, default=0.0) - min((r.submitted_at for r in everything), default=0.0)
    return summarize(
        folder.resolve().name,
        records,
        objective,
        wall_seconds=summary.get("wall_seconds", max(0.0, span)),
        gpus_per_trial=space.resources.gpus_per_trial if space else _gpus(summary),
        confirmed=confirmed,
        # Summaries of an earlier version do not say why a search is over.
        ended_by=summary.get("ended_by", "not recorded") if summary else None,
    )


def _gpus(summary: Mapping[str, Any]) -> float:
    """Return the GPUs of a trial, as the summary has counted them."""
    seconds = summary.get("training_seconds")
    return summary["gpu_hours"] * 3600 / seconds if seconds else 0.0


def _guess_parameters(records: Sequence[TrialRecord]) -> tuple[Parameter, ...]:
    """Return the searched keys with the range that the trials have had."""
    keys = dict.fromkeys(key for record in records for key in record.parameters)
    return tuple(
        _guess(key, [record.parameters[key] for record in records if key in record.parameters])
        for key in keys
    )


def _guess(key: str, values: Sequence[Any]) -> Parameter:
    numbers = [v for v in values if isinstance(v, float | int) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(set(numbers)) < 2 or all(type(v) is int for v in numbers):
        choices = sorted(set(values), key=lambda value: (str(type(value)), value))
        return Parameter(key=key, kind="choice", values=tuple(choices), when={})
    low, high = min(numbers), max(numbers)
    is_log = low > 0 and high / low > _LOG_RATIO
    return Parameter(
        key=key, kind="log_uniform" if is_log else "uniform", values=(low, high), when={}
    )
