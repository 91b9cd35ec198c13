"""Reads results folders: the one place that knows their files, and what can be wrong with them.

    reader = FolderReader(folder)
    records, confirmed = reader.ended()
    reader.raise_if_damaged()       # or go on with what there is, and show `reader.problems`

What is damaged is told and left out; what other files say too is made up for, and that is told in
`reader.notes`. Nothing is written here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nanovlm.config.search_settings import Objective, join
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import UserError, plain_rule
from nanovlm.messages import Report, TrialRecord
from nanovlm.records import read_record
from nanovlm.results.contents import ANSWER, DATA, ENVIRONMENT, SUMMARY, VERDICT, Answer

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


def answers_file(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder writes its answers to the benchmark."""
    return folder / ANSWERS_DIR / f"{trial_id}.jsonl"


def read_text(path: Path) -> str | None:
    """Return what a file holds, None if it is not there.

    Raises UserError if it is a folder, may not be read, or is no text.
    """
    try:
        return path.read_bytes().decode()
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
    *lines, cut = text.split("\n")
    answers = []
    for number, line in enumerate([*lines, cut] if cut or not lines else lines, 1):
        try:
            answers.append(ANSWER.validate_json(line))
        except ValidationError:
            remedy = f"{_PUT_BACK}, or remove the file"
            raise UserError(f"{path}: line {number}: is not an answer; {remedy}") from None
    return answers


def decided_reports(record: TrialRecord) -> list[tuple[Report, bool]]:
    """Return each report of an ended trial that was compared with those of others, and whether the
    trial went on after it. A failed one was withdrawn later."""
    if record.state == "failed":
        return [(report, True) for report in record.reports]
    is_pruned = record.end is not None and record.end.was_compared and record.state == "stopped"
    reports = record.reports if is_pruned else record.reports[:-1]
    last = len(record.reports) - 1
    return [(report, place < last) for place, report in enumerate(reports)]


class FolderReader:
    """Reads the files of a results folder, and keeps in mind what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        """What is damaged or missing, and what to do, in a sentence each."""
        self.notes: list[str] = []
        """What was damaged or missing, and is made up for."""
        self.is_cut: dict[str, bool] = {}
        """Whether the last line of a file that was read was cut."""

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
        """Take note of folders in the place of files, and the other way round."""
        for name in FILES:
            if (self.folder / name).is_dir():
                self._problem(name, "is a folder, where a file is wanted; move it away")
        for name in FOLDERS:
            path = self.folder / name
            if path.exists() and not path.is_dir():
                self._problem(name, "is a file, where a folder is wanted; move it away")

    # ------------------------------------------------------------------ the trials

    def ended(self) -> tuple[list[TrialRecord], list[TrialRecord]]:
        """Return the ended trials and the ended runs that confirm, in the order of their end."""
        summary = self._quietly_read_summary()  # first: a search that runs adds to what follows
        records, confirmed = self._records(TRIALS_FILE), self._records(CONFIRM_FILE)
        if summary is not None:
            runs = (summary["confirmation"] or {}).get("configurations", ())
            self._check_number(TRIALS_FILE, records, summary["trials"].get("total", 0))
            num_runs = sum(len(c["runs"]) + len(c["failed"]) for c in runs)
            self._check_number(CONFIRM_FILE, confirmed, num_runs)
        return records, confirmed

    def _records(self, name: str) -> list[TrialRecord]:
        records: list[TrialRecord] = []
        ids: set[str] = set()
        for number, line in self._lines(name):
            try:
                record = read_record(line)
                if record.trial_id in ids or record.end is None:
                    raise ValueError(f"{record.trial_id} stands twice or has not ended")
            except (ValueError, RecursionError) as error:
                remedy = f"{_PUT_BACK}, or take out the line: its trial runs again"
                self._problem(name, f"line {number}: is not a trial: {error}; {remedy}")
                continue
            ids.add(record.trial_id)
            records.append(record)
        return records

    def _check_number(self, name: str, found: Sequence[TrialRecord], counted: int) -> None:
        """Take note of trials that were lost."""
        is_told = any(str(self.folder / name) in problem for problem in self.problems)
        if len(found) + self.is_cut[name] < counted and not is_told:
            self._problem(
                name,
                f"has {len(found)} trials, but {SUMMARY_FILE} counts {counted}: lines are lost; "
                f"{_PUT_BACK}, or remove {SUMMARY_FILE} to let the lost trials run again",
            )

    def paused(self, ended: Sequence[TrialRecord]) -> dict[int, TrialRecord]:
        """Return the trials that wait to go on, by number, as they were when they paused.

        What is lost is no loss: a trial without its line makes its reports again from its state.

        Args:
            ended: the records of the trials that have ended.
        """
        summary = self._quietly_read_summary()  # first: a search that runs adds to what follows
        last: dict[int, TrialRecord] = {}
        for number, line in self._lines(PAUSED_FILE):
            try:
                record = read_record(line)
                if record.end is not None:
                    raise ValueError(f"{record.trial_id} has ended")
            except (ValueError, RecursionError) as error:
                said = f"line {number}: is not a trial that pauses: {error}; it is left out"
                self._make_up_for_pauses(said)
                continue
            last[record.number] = record
        counted = 0 if summary is None else summary["trials"].get("paused", 0)
        if len(last) + self.is_cut[PAUSED_FILE] < counted:
            self._make_up_for_pauses(f"has {len(last)} trials, but {counted} are paused")
        over = {record.number for record in ended}
        return {n: record for n, record in last.items() if record.is_paused and n not in over}

    def _make_up_for_pauses(self, said: str) -> None:
        remedy = "a trial that is lost here makes its reports again when the search goes on"
        self.notes.append(f"{self.folder / PAUSED_FILE}: {said}; {remedy}")

    # ------------------------------------------------------------------ what is said of them

    def summary(self, records: Sequence[TrialRecord]) -> dict[str, Any] | None:
        """Return `summary.json`; None if it is damaged, or gone, or there is none yet.

        Args:
            records: of the ended trials; with the first of them there is a summary.
        """
        if records and not self.has(SUMMARY_FILE):
            self.notes.append(f"{self.folder / SUMMARY_FILE}: is not there; counted anew")
        return self._object(SUMMARY_FILE, SUMMARY, self.notes, "counted anew")

    def _quietly_read_summary(self) -> dict[str, Any] | None:
        return self._object(SUMMARY_FILE, SUMMARY, [])

    def objective(self) -> Objective:
        """Return what is searched for, by `summary.json`; the usual if it does not say."""
        content = self._quietly_read_summary()
        if content and (pareto := content.get("pareto")):
            return join([Objective(**each) for each in pareto["objectives"]])
        return Objective(**content["objective"]) if content else Objective()

    def data(self) -> dict[str, Any] | None:
        """Return `data.json`, None if it is gone or damaged."""
        return self._object(DATA_FILE, DATA, self.problems)

    def environment(self) -> dict[str, Any]:
        """Return `environment.json`; nothing if it is gone or damaged."""
        return self._object(ENVIRONMENT_FILE, ENVIRONMENT, self.problems) or {}

    def decisions(self, records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
        """Return the lines of `rungs.jsonl`: verdicts, and trials that were withdrawn.

        Args:
            records: of the ended trials; their verdicts must be there.
        """
        found: list[dict[str, Any]] = []
        for number, line in self._lines(RUNGS_FILE):
            content = self._parsed(f"{RUNGS_FILE}: line {number}", line, VERDICT, self.problems)
            found += [] if content is None else [content]
        known = {(line["number"], line["samples_seen"]) for line in found if "number" in line}
        withdrawn = {line["withdrawn"] for line in found if "withdrawn" in line}
        stand = [record for record in records if record.state != "failed"]
        judged = [(r.number, made.samples_seen) for r in stand for made, _ in decided_reports(r)]
        failed = {r.number for r in records if r.state == "failed"} & {
            number for number, _ in known
        }
        lost = sum(place not in known for place in judged) + len(failed - withdrawn)
        if lost:
            self._problem(RUNGS_FILE, f"lacks {lost} lines on trials that have ended")
        return found

    def space(self, records: Sequence[TrialRecord]) -> SearchSpace | None:
        """Return the space that is searched; None for a single run, and if it is damaged."""
        if not self.has(SPACE_FILE):
            if self.is_search(records):
                self.notes.append(
                    f"{self.folder / SPACE_FILE}: is not there; what was searched, and in which "
                    "ranges, is known from the trials alone"
                )
            return None
        try:
            return load_space(self.folder / SPACE_FILE)
        except UserError as error:
            self.problems += [f"{message}; {_PUT_BACK}" for message in error.messages]
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

    # ------------------------------------------------------------------ files

    def _problem(self, name: str, text: str) -> None:
        self.problems.append(f"{self.folder / name}: {text}")

    def _text(self, name: str, told: list[str]) -> str | None:
        try:
            return read_text(self.folder / name)
        except UserError as error:
            told += error.messages
            return None

    def _lines(self, name: str) -> list[tuple[int, str]]:
        """Return the lines of a file that are whole, with their numbers."""
        self.is_cut[name] = False
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            self._text(name, self.problems)  # says what is wrong
            return []
        *lines, cut = content.decode(errors="replace").split("\n")
        self.is_cut[name] = bool(cut)
        if cut:
            self.notes.append(f"{self.folder / name}: the last line was cut, and is left out")
        return [(number, line) for number, line in enumerate(lines, 1) if line]

    def _object(
        self, name: str, kind: TypeAdapter[Any], told: list[str], remedy: str = _PUT_BACK
    ) -> dict[str, Any] | None:
        text = self._text(name, told)
        return None if text is None else self._parsed(name, text, kind, told, remedy)

    def _parsed(
        self,
        place: str,
        text: str,
        kind: TypeAdapter[Any],
        told: list[str],
        remedy: str = _PUT_BACK,
    ) -> dict[str, Any] | None:
        """Return an object of JSON, None if it is not of the kind."""
        try:
            content = json.loads(text)
            kind.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            rule = f"{'.'.join(map(str, first['loc']))}: {plain_rule(first['msg'])}"
        except (ValueError, RecursionError):
            rule = f"this is not JSON: {text[:40]!r}"
        else:
            return dict(content)
        told.append(f"{self.folder / place}: is damaged: {rule}; {remedy}")
        return None
