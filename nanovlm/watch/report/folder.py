"""Reads a results folder for its report, as far as it can be read.

What is missing or broken is not an error here: the report says it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanovlm.config.parameter import Kind, Parameter
from nanovlm.config.search_settings import Objective
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.messages import TrialRecord
from nanovlm.results import read
from nanovlm.results.conclusion import DEFAULT_NUMBER, gain_counts, interval_by_questions
from nanovlm.results.confirmation import confirmation_and_problems
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.summary import best_record, final_best, recount

_RESULTS = (
    read.TRIALS_FILE, read.CONFIRM_FILE, read.PAUSED_FILE, read.RUNGS_FILE, read.SUMMARY_FILE,
    read.SPACE_FILE, read.CONFIG_FILE,
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
    paused: Sequence[TrialRecord]
    """Of the trials that wait to go on."""
    decisions: Sequence[PruningDecision]
    """The last one on each trial at each milestone."""
    space: SearchSpace | None
    summary: Mapping[str, Any]
    """As in `summary.json`, but counted anew from the records."""
    confirmation: Mapping[str, Any] | None
    """As in `summary.json`: the result of the confirming runs."""
    best: TrialRecord | None
    """The run that `best.yaml` and `best/` are of."""
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    missing: Sequence[str]
    """What is missing or cannot be read, in a sentence each."""
    parameters: Sequence[Parameter]
    """The searched keys; without a space file guessed from the trials."""
    is_search: bool
    """False for a single run."""

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
        """Why the search is over; None while it runs."""
        ended_by: str | None = self.summary["ended_by"]
        return ended_by

    @cached_property
    def best_trial(self) -> TrialRecord | None:
        """The trial of the search whose configuration is the best."""
        number = None if self.best is None else self.best.number
        trial = next((r for r in self.records if r.number == number), None)
        return trial or best_record(self.records, self.objective)

    @cached_property
    def default(self) -> TrialRecord | None:
        """The trial of the base configuration, if it has ended."""
        return next((r for r in self.records if r.number == DEFAULT_NUMBER), None)

    @property
    def special(self) -> dict[str, TrialRecord]:
        """The trials that every chart highlights: `default` and `best`, if they are there."""
        found = {"default": self.default, "best": self.best_trial}
        return {kind: record for kind, record in found.items() if record is not None}

    @property
    def default_values(self) -> Mapping[str, Any]:
        """The searched keys of the default configuration."""
        if self.space is not None:
            return self.space.default_values()
        return self.default.parameters if self.default else {}

    @property
    def winner(self) -> Mapping[str, Any] | None:
        """The configuration that the confirming runs chose, as in `summary.json`."""
        found = self.confirmation or {"winner": None}
        return None if found["winner"] is None else dict(found["configurations"][0])

    @property
    def devices(self) -> tuple[str, float]:
        """What a trial occupies: `GPU` or, without one, `worker`, and how many."""
        if self.space is None:
            return "worker", 1.0
        gpus = self.space.resources.gpus_per_trial
        return ("GPU", gpus) if gpus else ("worker", float(self.space.resources.workers))

    @property
    def milestones(self) -> list[int]:
        """Samples seen at which trials were compared."""
        return sorted({decision.milestone for decision in self.decisions})

    @property
    def running(self) -> dict[int, list[tuple[float, float]]]:
        """Samples seen and objective at each milestone of the running trials, by number."""
        ended = {record.number for record in self.trials}
        curves: dict[int, list[tuple[float, float]]] = {}
        for decision in self.decisions if self.ended_by is None else ():
            if decision.number not in ended:
                point = decision.samples_seen, decision.value
                curves.setdefault(decision.number, []).append(point)
        return curves

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why each trial waits, was stopped or failed, and the notes of its workers, by its id."""
        cut = {d.number: d.reason for d in self.decisions if not d.goes_on}
        found = {}
        for record in self.trials:
            pruned = cut.get(record.number) if record.state in ("paused", "stopped") else None
            notes = dict.fromkeys(note for report in record.reports for note in report.notes)
            said = filter(None, (record.reason or pruned, *notes))
            found[record.trial_id] = "; ".join(said)
        return found

    # ------------------------------------------------------------------ the headline

    @property
    def gain(self) -> Mapping[str, Any]:
        """The gain over the default configuration, as `difference_to_default` of `summary.json`: of
        the confirming runs or, without `seeds`, of the search. `none` says why there is none."""
        winner, metric = self.winner, self.metric
        if winner and winner["number"] == DEFAULT_NUMBER:
            return {"none": "the default configuration is best"}
        if winner and (confirmed := winner["difference_to_default"]):
            return dict(confirmed)
        best, default = self.best_trial, self.default
        if best is None or default is None or metric not in default.metrics:
            return {"none": "the default trial has no value yet"}
        if best is default:
            return {"none": "the default configuration is best so far"}
        if default.state != "completed":
            return {"none": f"the default trial has {default.state}"}
        interval = interval_by_questions(best, default, metric, self.folder / read.ANSWERS_DIR)
        return {"mean": best.metrics[metric] - default.metrics[metric], "interval_95": interval}

    @property
    def verdict(self) -> tuple[str, bool] | None:
        """The sentence on the confirmation, and whether there is a gain that counts."""
        if (confirmation := self.confirmation) is None:
            return None
        text = confirmation["verdict"]
        # A summary of an earlier version, all that is left of its confirmation, does not say it.
        counts = confirmation.get("gain_counts")
        if counts is None:
            counts = gain_counts(confirmation["configurations"], self.objective)
        return text[:1].upper() + text[1:] + ".", bool(counts)


def read_search(folder: Path) -> SearchFolder:
    """Return what can be read of a results folder.

    Raises:
        UserError: there is no such folder, or it holds nothing of a search or a single run.
    """
    reader = read.FolderReader(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a results folder: no such folder")
    if not reader.has(*_RESULTS):
        raise UserError(f"{folder}: holds no results of a search: none of {', '.join(_RESULTS)}")
    records, confirmed = reader.ended()
    if not reader.has(read.TRIALS_FILE):
        reader.notes.append(
            f"{read.TRIALS_FILE} is not there: no trial has ended, or the file is lost"
        )
    paused = list(reader.paused(records).values())
    space = reader.space(records)
    objective = space.objective if space else reader.objective()
    answers = folder / read.ANSWERS_DIR
    confirmation, lost = confirmation_and_problems(confirmed, records, objective, answers)
    summary = reader.summary(records)
    is_search = reader.is_search(records)
    decisions, withdrawn = reader.decisions(records if is_search else ())
    data, environment = reader.data() or {}, reader.environment()
    if not reader.has(read.DATA_FILE):
        reader.notes.append(f"{read.DATA_FILE} is not there")
    return SearchFolder(
        folder=folder,
        objective=objective,
        records=records,
        confirmed=confirmed,
        paused=paused,
        decisions=_last(decisions, withdrawn),
        space=space,
        summary=recount(folder, summary, records, confirmed, None, objective, space, paused),
        confirmation=confirmation or (summary or {}).get("confirmation"),
        best=final_best(records, objective, confirmed, confirmation),
        data=data,
        environment=environment,
        missing=(*reader.problems, *reader.notes, *lost),
        parameters=space.parameters if space else _guess_parameters(records),
        is_search=is_search,
    )


def _last(
    decisions: Sequence[PruningDecision], withdrawn: Collection[int]
) -> list[PruningDecision]:
    """Return the last decision on each trial at each milestone; none on withdrawn trials."""
    last = {(decision.number, decision.milestone): decision for decision in decisions}
    return [decision for decision in last.values() if decision.number not in withdrawn]


def _guess_parameters(records: Sequence[TrialRecord]) -> tuple[Parameter, ...]:
    """Return the searched keys with the range of their values in the trials."""
    found: dict[str, list[Any]] = {}
    for key, value in (item for record in records for item in record.parameters.items()):
        found.setdefault(key, []).append(value)
    return tuple(_guess(key, set(values)) for key, values in found.items())


def _guess(key: str, values: Collection[Any]) -> Parameter:
    kind: Kind = "choice"
    ends = sorted(values, key=lambda value: (str(type(value)), value))
    if len(values) > 1 and all(type(value) is float for value in values):
        low, high = ends = [ends[0], ends[-1]]
        kind = "log_uniform" if low > 0 and high / low > _LOG_RATIO else "uniform"
    return Parameter(key=key, kind=kind, values=tuple(ends), when={})
