"""Reads a results folder for its report, as far as it can be read.

What is missing or broken is not an error here: it is said in the report.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.config.parameter import Parameter
from nanovlm.config.search_settings import Objective
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results.conclusion import DEFAULT_NUMBER
from nanovlm.results.confirmation import confirmation_and_problems
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    CONFIG_FILE,
    CONFIRM_FILE,
    DATA_FILE,
    PAUSED_FILE,
    RUNGS_FILE,
    SPACE_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    FolderReader,
)
from nanovlm.results.summary import best_record, final_best, recount

_WATCHED = (
    TRIALS_FILE, CONFIRM_FILE, PAUSED_FILE, RUNGS_FILE, SUMMARY_FILE, SPACE_FILE, CONFIG_FILE,
)  # fmt: skip
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
    paused: Sequence[TrialRecord] = ()
    """Of the trials that wait to go on."""
    verdicts: Sequence[Mapping[str, Any]]
    """Lines of `rungs.jsonl`, the last one of each trial and milestone; those of withdrawn trials
    are left out."""
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
    def trials(self) -> Sequence[TrialRecord]:
        """The trials that have ended and those that wait to go on."""
        return (*self.records, *self.paused)

    @property
    def runs(self) -> Sequence[TrialRecord]:
        """The trials, and the confirming runs."""
        return (*self.trials, *self.confirmed)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def metric(self) -> str:
        return self.objective.metric

    @property
    def is_tradeoff(self) -> bool:
        """Whether there are several objectives."""
        return len(self.objective.all) > 1

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
    reader = FolderReader(folder)
    records, confirmed = reader.ended()
    if not reader.has(TRIALS_FILE):
        reader.notes.append(f"{TRIALS_FILE} is not there: no trial has ended, or the file is lost")
    paused = list(reader.paused(records).values())
    space = reader.space(records)
    objective = space.objective if space else reader.objective()
    confirmation, problems = confirmation_and_problems(
        confirmed, records, objective, folder / ANSWERS_DIR
    )
    summary = reader.summary(records)
    verdicts = _standing(*reader.decisions(records if reader.is_search(records) else ()))
    data, environment = reader.data(), reader.environment()
    if data is None and not reader.has(DATA_FILE):
        reader.notes.append(f"{DATA_FILE} is not there")
    return SearchFolder(
        folder=folder,
        objective=objective,
        records=records,
        confirmed=confirmed,
        paused=paused,
        verdicts=verdicts,
        space=space,
        summary=recount(folder, summary, records, confirmed, None, objective, space, paused),
        confirmation=confirmation or (summary or {}).get("confirmation"),
        best=final_best(records, objective, confirmed, confirmation),
        data=data or {},
        environment=environment,
        missing=(*reader.problems, *reader.notes, *problems),
        parameters=space.parameters if space else _guess_parameters(records),
        is_search=reader.is_search(records),
        changed_at=max(
            (folder / name).stat().st_mtime for name in _WATCHED if (folder / name).exists()
        ),
        by_number={record.number: record for record in records},
    )


def _standing(
    decisions: Sequence[PruningDecision], withdrawn: Collection[int]
) -> list[Mapping[str, Any]]:
    """Return the last verdict on each trial at each milestone, without those of trials that failed
    and were withdrawn."""
    last = {(decision.number, decision.milestone): decision for decision in decisions}
    return [asdict(decision) for decision in last.values() if decision.number not in withdrawn]


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
