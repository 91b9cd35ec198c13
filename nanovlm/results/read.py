"""Reads results folders: the one module that knows their files, and what can be wrong with them.

    reader = FolderReader(folder)
    records, confirmed = reader.ended()
    reader.raise_if_damaged()       # or go on with what there is, and show `reader.problems`

What is damaged is named in `reader.problems` and left out; what other files hold too is restored
from there, and `reader.notes` says so. Nothing is written here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from nanovlm.config.search_settings import Objective, join
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import UserError, plain_rule
from nanovlm.messages import TrialRecord
from nanovlm.records import read_record
from nanovlm.results.decisions import LINE, PruningDecision, Withdrawal, decided_reports
from nanovlm.results.statistics import ANSWER_METRICS

SPACE_FILE = "space.yaml"
CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"
ENVIRONMENT_FILE = "environment.json"
TRIALS_FILE = "trials.jsonl"
CONFIRM_FILE = "confirm.jsonl"
PAUSED_FILE = "paused.jsonl"
RUNGS_FILE = "rungs.jsonl"
STUDY_FILE = "study.journal"
SEARCH_ID_FILE = "study.id"
SUMMARY_FILE = "summary.json"
BEST_CONFIG_FILE = "best.yaml"
REPORT_FILE = "report.html"
FILES = (
    SPACE_FILE, CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, TRIALS_FILE, CONFIRM_FILE, PAUSED_FILE,
    RUNGS_FILE, STUDY_FILE, SEARCH_ID_FILE, SUMMARY_FILE, BEST_CONFIG_FILE, REPORT_FILE,
)  # fmt: skip

ANSWERS_DIR = "answers"
BEST_MODEL_DIR = "best"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "logs"
TENSORBOARD_DIR = "tensorboard"
WANDB_DIR = "wandb"
FOLDERS = (
    ANSWERS_DIR, BEST_MODEL_DIR, CHECKPOINTS_DIR, LOGS_DIR, TENSORBOARD_DIR, WANDB_DIR,
)  # fmt: skip

_PUT_BACK = "put back a copy of it"

# What the readers require of the JSON files; other fields are allowed.


class _Pareto(TypedDict):
    objectives: list[Objective]


class _Summary(TypedDict):
    objective: Objective
    wall_seconds: Annotated[float, Field(ge=0)]
    gpu_hours: float
    training_seconds: float
    trials: dict[str, int]
    best: dict[str, Any] | None
    confirmation: NotRequired[dict[str, Any] | None]
    pareto: NotRequired[_Pareto | None]
    ended_by: NotRequired[str | None]


class _Data(TypedDict):
    training: dict[str, Any]
    benchmark: dict[str, Any]


class _Environment(TypedDict):
    python: str
    packages: dict[str, str | None]


class Answer(TypedDict):
    """A line of a file of answers."""

    index: int
    answer: str
    output: NotRequired[str]
    correct: bool
    letter: str
    letter_nll: NotRequired[float]


_SUMMARY, _DATA = TypeAdapter(_Summary), TypeAdapter(_Data)
_ENVIRONMENT, _ANSWER = TypeAdapter(_Environment), TypeAdapter(Answer)


def answers_file(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder writes its answers to the benchmark."""
    return folder / ANSWERS_DIR / f"{trial_id}.jsonl"


def read_text(path: Path, errors: str = "strict") -> str | None:
    """Return the content of a file, None if it is not there.

    Raises UserError if it is a folder, may not be read, or is no text (with `errors="strict"`).
    """
    try:
        return path.read_bytes().decode(errors=errors)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, where a file is wanted; move it away") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: is damaged, this is no text; {_PUT_BACK}") from None


def read_records(folder: Path) -> list[TrialRecord]:
    """Return the ended trials of a results folder, in the order of their end.

    A last line that was cut, by a full disk or a power loss, is left out.

    Raises:
        UserError: for any other line that is not a trial, and for trials that are missing.
    """
    reader = FolderReader(folder)
    records, _ = reader.ended()
    reader.raise_if_damaged()
    return records


def read_answer_lines(path: Path) -> list[Answer]:
    """Return what a file of answers says of each question.

    Raises:
        UserError: there is no such file, a line of it is not an answer, or the last one was cut.
    """
    text = read_text(path)
    if text is None:
        raise UserError(f"{path}: there is no such file")
    answers = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            answers.append(_ANSWER.validate_json(line))
        except ValidationError:
            remedy = f"{_PUT_BACK}, or remove the file"
            raise UserError(f"{path}: line {number}: is not an answer; {remedy}") from None
    return answers


def read_answers(path: Path, metric: str = "mmstar_accuracy") -> dict[int, bool]:
    """Return whether each question was answered correctly, by its own number.

    Args:
        metric: of `ANSWER_METRICS`: whether the answer in words is right, or the likeliest letter.

    Raises:
        UserError: the file is not one of answers, or it is cut.
    """
    assert metric in ANSWER_METRICS, metric
    is_by_letter = metric == "mmstar_letter_accuracy"
    return {
        item["index"]: item["letter"] == item["answer"] if is_by_letter else item["correct"]
        for item in read_answer_lines(path)
    }


class FolderReader:
    """Reads the files of a results folder, and collects what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        """What is damaged or missing, and what to do, in a sentence each."""
        self.notes: list[str] = []
        """What was damaged or missing, and is restored from other files."""

    def has(self, *names: str) -> bool:
        """Return whether one of the files is there, whatever it holds."""
        return any((self.folder / name).exists() for name in names)

    def is_search(self, records: Sequence[TrialRecord]) -> bool:
        """Return whether it is the folder of a search, and not that of a single run."""
        has_searched = len(records) > 1 or any(record.parameters for record in records)
        return self.has(SPACE_FILE, CONFIRM_FILE) or (not self.has(CONFIG_FILE) and has_searched)

    def raise_if_damaged(self) -> None:
        """Raise UserError with all problems."""
        if self.problems:
            raise UserError(*self.problems)

    def check_kinds(self) -> None:
        """Report folders in the place of files, and the other way round, as problems."""
        for name in FILES:
            if (self.folder / name).is_dir():
                self._problem(name, "is a folder, where a file is wanted; move it away")
        for name in FOLDERS:
            if self.has(name) and not (self.folder / name).is_dir():
                self._problem(name, "is a file, where a folder is wanted; move it away")

    # ------------------------------------------------------------------ the trials

    def ended(self) -> tuple[list[TrialRecord], list[TrialRecord]]:
        """Return the ended trials and the ended confirming runs, in the order of their end."""
        summary = self._known_summary()  # first: a search that runs adds to what follows
        runs = ((summary or {}).get("confirmation") or {}).get("configurations", ())
        num_trials = summary["trials"].get("total", 0) if summary else 0
        num_runs = sum(len(c["runs"]) + len(c["failed"]) for c in runs)
        return self._ended(TRIALS_FILE, num_trials), self._ended(CONFIRM_FILE, num_runs)

    def _ended(self, name: str, counted: int) -> list[TrialRecord]:
        """Return the records of a file, and check that `summary.json` has counted no more."""
        remedy = f"{_PUT_BACK}, or take out the line: its trial runs again"
        num_problems = len(self.problems)
        records, is_cut = self._records(name, "a trial", remedy, self.problems, is_ended=True)
        found = len({record.trial_id for record in records})
        if found < len(records):
            self._problem(name, f"a trial is there twice; {_PUT_BACK}")
        if found + is_cut < counted and len(self.problems) == num_problems:
            self._problem(
                name,
                f"has {found} trials, but {SUMMARY_FILE} counts {counted}: lines are lost; "
                f"{_PUT_BACK}, or remove {SUMMARY_FILE} to let the lost trials run again",
            )
        return records

    def paused(self, ended: Sequence[TrialRecord]) -> dict[int, TrialRecord]:
        """Return the trials that wait to go on, by number, as they were when they paused.

        A lost line does no harm: its trial makes its reports again from its state.

        Args:
            ended: the records of the trials that have ended.
        """
        summary = self._known_summary()  # first: a search that runs adds to what follows
        counted = summary["trials"].get("paused", 0) if summary else 0
        remedy = "a trial that is lost here makes its reports again when the search goes on"
        records, is_cut = self._records(
            PAUSED_FILE, "a trial that pauses", remedy, self.notes, is_ended=False
        )
        last = {record.number: record for record in records}
        if len(last) + is_cut < counted:
            lost = f"has {len(last)} trials, but {counted} are paused; {remedy}"
            self.notes.append(f"{self.folder / PAUSED_FILE}: {lost}")
        over = {record.number for record in ended}
        return {n: record for n, record in last.items() if record.is_paused and n not in over}

    def _records(
        self, name: str, what: str, remedy: str, problems: list[str], *, is_ended: bool
    ) -> tuple[list[TrialRecord], bool]:
        """Return the records of a file, and whether its last line was cut."""
        records: list[TrialRecord] = []
        lines, is_cut = self._lines(name)
        for number, line in lines:
            try:
                record = read_record(line)
                if (record.end is not None) is not is_ended:
                    raise ValueError(f"{record.trial_id} has {'not ' * is_ended}ended")
                records.append(record)
            except (ValueError, RecursionError) as error:
                said = f"line {number}: is not {what}: {error}; {remedy}"
                problems.append(f"{self.folder / name}: {said}")
        return records, is_cut

    # ------------------------------------------------------------------ the other files

    def summary(self, records: Sequence[TrialRecord]) -> dict[str, Any] | None:
        """Return `summary.json`; None if it is damaged, or gone, or there is none yet.

        Args:
            records: of the ended trials; with the first of them there is a summary.
        """
        if records and not self.has(SUMMARY_FILE):
            self.notes.append(f"{self.folder / SUMMARY_FILE}: is not there; counted anew")
        return self._object(SUMMARY_FILE, _SUMMARY, self.notes, "counted anew")

    def _known_summary(self) -> dict[str, Any] | None:
        """Return `summary.json` if it can be read; `summary` says why it cannot."""
        return self._object(SUMMARY_FILE, _SUMMARY, [])

    def objective(self) -> Objective:
        """Return the objective by `summary.json`; the default one if that is lost."""
        content = self._known_summary()
        if content and (pareto := content.get("pareto")):
            return join([Objective(**each) for each in pareto["objectives"]])
        return Objective(**content["objective"]) if content else Objective()

    def data(self) -> dict[str, Any] | None:
        """Return `data.json`, None if it is gone or damaged."""
        return self._object(DATA_FILE, _DATA, self.problems)

    def environment(self) -> dict[str, Any]:
        """Return `environment.json`; nothing if it is gone or damaged."""
        return self._object(ENVIRONMENT_FILE, _ENVIRONMENT, self.problems) or {}

    def decisions(self, records: Sequence[TrialRecord]) -> tuple[list[PruningDecision], set[int]]:
        """Return the decisions of `rungs.jsonl`, and the numbers of the trials that were withdrawn.

        Args:
            records: of the ended trials; their decisions must be there.
        """
        found = [
            self._parsed(f"{RUNGS_FILE}: line {number}", line, LINE, self.problems)
            for number, line in self._lines(RUNGS_FILE)[0]
        ]
        decisions = [line for line in found if isinstance(line, PruningDecision)]
        withdrawn = {line.withdrawn for line in found if isinstance(line, Withdrawal)}
        known = {(decision.number, decision.samples_seen) for decision in decisions}
        failed = {record.number for record in records if record.state == "failed"}
        lost = len(failed & {decision.number for decision in decisions} - withdrawn) + sum(
            (record.number, report.samples_seen) not in known
            for record in records
            if record.number not in failed
            for report, _ in decided_reports(record)
        )
        if lost:
            self._problem(RUNGS_FILE, f"lacks {lost} lines on trials that have ended")
        return decisions, withdrawn

    def space(self, records: Sequence[TrialRecord]) -> SearchSpace | None:
        """Return the space that is searched; None for a single run, and if it is damaged."""
        if self.has(SPACE_FILE):
            try:
                return load_space(self.folder / SPACE_FILE)
            except UserError as error:
                self.problems += [f"{message}; {_PUT_BACK}" for message in error.messages]
        elif self.is_search(records):
            self.notes.append(
                f"{self.folder / SPACE_FILE}: is not there; what was searched, and in which "
                "ranges, is known from the trials alone"
            )
        return None

    def config(self, name: str = CONFIG_FILE) -> dict[str, Any] | None:
        """Return the configuration in a file, None if it is damaged or gone."""
        try:
            content = read_mapping(self.folder / name)
        except UserError as error:
            self.problems += error.messages
            return None
        if not content:
            self._problem(name, "is empty")
        return content or None

    # ------------------------------------------------------------------ lines and objects

    def _problem(self, name: str, text: str) -> None:
        self.problems.append(f"{self.folder / name}: {text}")

    def _lines(self, name: str) -> tuple[list[tuple[int, str]], bool]:
        """Return the whole lines of a file with their numbers, and whether the last one was cut."""
        *lines, cut = (self._text(name, self.problems, "replace") or "").split("\n")
        if cut:
            self.notes.append(f"{self.folder / name}: the last line was cut, and is left out")
        return [(number, line) for number, line in enumerate(lines, 1) if line], bool(cut)

    def _text(self, name: str, problems: list[str], errors: str = "strict") -> str | None:
        try:
            return read_text(self.folder / name, errors)
        except UserError as error:
            problems += error.messages
            return None

    def _object(
        self, name: str, kind: TypeAdapter[Any], problems: list[str], remedy: str = _PUT_BACK
    ) -> dict[str, Any] | None:
        """Return an object as it stands in its file, None if it is gone or not of the kind."""
        text = self._text(name, problems)
        is_valid = text is not None and self._parsed(name, text, kind, problems, remedy)
        return json.loads(text) if text is not None and is_valid else None

    def _parsed(
        self, name: str, text: str, kind: TypeAdapter[Any], problems: list[str],
        remedy: str = _PUT_BACK,
    ) -> Any:  # fmt: skip
        """Return what the text says as an object of the kind, None if it is not of the kind."""
        try:
            return kind.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            rule = f"{field}: {plain_rule(first['msg'])}" if field else plain_rule(first["msg"])
            problems.append(f"{self.folder / name}: is damaged: {rule}; {remedy}")
            return None
