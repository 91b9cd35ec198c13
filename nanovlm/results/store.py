"""Writes the results folder of a search or a single run, so that nothing finished is ever lost.

`trials.jsonl` grows by one line the moment a trial ends. Everything else is written beside its
place and then moved there, so a reader never sees half a file.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovlm.errors import UserError
from nanovlm.files import append, replace_json, replace_text
from nanovlm.messages import TrialRecord
from nanovlm.records import read_record, record_line
from nanovlm.results.confirmation import summarize_confirmation
from nanovlm.results.kept_models import KeptModels, model_dir
from nanovlm.results.summary import best_record, describe_accuracy, final_best, summarize
from nanovlm.search.sections import Objective
from nanovlm.yaml_text import write_yaml

SPACE_FILE = "space.yaml"
CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"
TRIALS_FILE = "trials.jsonl"
SUMMARY_FILE = "summary.json"
BEST_CONFIG_FILE = "best.yaml"
CONFIRM_FILE = "confirm.jsonl"
REPORT_FILE = "report.html"
ANSWERS_DIR = "answers"
LOGS_DIR = "logs"
LOCK_FILE = ".lock"

SECONDS_BETWEEN_SUMMARIES = 1.0


def choose_folder(results: Path, name: str | None, default_name: str) -> Path:
    """Return the results folder to make: `name`, or the default name with a number if it is taken.

    Raises:
        UserError: if the user named a folder that exists.
    """
    if name is None:
        return next(folder for folder in _numbered(results / default_name) if not folder.exists())
    folder = results / name
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name: must be the plain name of a folder, got {name!r}")
    if folder.exists():
        raise UserError(f"--name: {folder} holds results already; choose another name or remove it")
    return folder


def answers_file(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder writes its answers to the benchmark."""
    return folder / ANSWERS_DIR / f"{trial_id}.jsonl"


def _make(folder: Path) -> list[Path]:
    """Make the folder and its `logs/`; return the folders above it that were made for it."""
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        (folder / LOGS_DIR).mkdir()
    except OSError as error:
        raise UserError(f"--results: {folder} cannot be made: {error.strerror}") from None
    return parents


def _discard(folder: Path, parents: list[Path]) -> None:
    """Remove the folder, and those above it that hold nothing else."""
    shutil.rmtree(folder)
    for parent in parents:
        if any(parent.iterdir()):
            return
        parent.rmdir()


class ResultsStore:
    """The results folder that the running program writes."""

    def __init__(
        self, folder: Path, objective: Objective, gpus_per_trial: float, num_models: int = 1
    ) -> None:
        """
        Args:
            num_models: so many of the best trials keep their models.
        """
        self.folder = folder
        self.objective = objective
        self._gpus_per_trial = gpus_per_trial
        self.has_begun = False
        self.records: list[TrialRecord] = []
        """Of the ended trials, in the order of their end."""
        self.confirmed: list[TrialRecord] = []
        """Of the ended runs that confirm, in the order of their end."""
        self._models = KeptModels(folder, objective, num_models)
        self._ended: set[str] = set()
        self.best: TrialRecord | None = None
        """The trial, or the run that confirms it, that `best.yaml` and `best/` are of."""
        self._summary_at = -math.inf  # by time.monotonic

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Make the folder, or go on with it, for as long as the context lasts; nobody else may.

        A folder that was made for nothing, because the program ended before `begin`, is removed.

        Raises:
            UserError: if it cannot be made, or another program works in it.
        """
        parents = [] if resume else _make(self.folder)
        with (self.folder / LOGS_DIR / LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another program works in this folder") from None
            if resume:
                self.records = _mend(self.folder / TRIALS_FILE)
                self.confirmed = _mend(self.folder / CONFIRM_FILE)
                self._ended = {record.trial_id for record in (*self.records, *self.confirmed)}
                self._models.restore(self.records)
                self.best = self._find_best()
            try:
                yield
            finally:
                if not resume and not self.has_begun:
                    _discard(self.folder, parents)

    def begin(self) -> None:
        """Keep the folder from now on."""
        self.has_begun = True

    def earlier_seconds(self) -> float:
        """Return how long the search ran before it was interrupted, by its summary."""
        path = self.folder / SUMMARY_FILE
        return json.loads(path.read_text())["wall_seconds"] if path.exists() else 0.0

    def close(self, wall_seconds: float, ended_by: str) -> dict[str, Any]:
        """Write the last summary and return it; remove models and answers that nobody needs."""
        summary = self._write_summary(wall_seconds, ended_by)
        is_settled = bool(self.confirmed) and self.best in self.confirmed
        confirmed = () if is_settled else [record.trial_id for record in self.confirmed]
        self._models.clean(self._ended, confirmed)
        ended = {answers_file(self.folder, trial_id) for trial_id in self._ended}
        for path in (self.folder / ANSWERS_DIR).glob("*"):
            if path not in ended:
                path.unlink()
        return summary

    def write_text(self, name: str, text: str) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_text(self.folder / name, text)

    def write_json(self, name: str, content: Any) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_json(self.folder / name, content)

    def add(self, record: TrialRecord) -> None:
        """Append an ended trial, and keep its model if it is among the best; or an ended run that
        confirms one."""
        self._check_new(record)
        if record.confirms:
            self.confirmed.append(record)
            append(self.folder / CONFIRM_FILE, record_line(record))
            self._models.forget_state(record.trial_id)
            return
        self.records.append(record)
        # After a confirmation only the next one changes what is best.
        is_best = not self.confirmed and self._beats_best(record)
        self._models.settle(record)
        if is_best and model_dir(self.folder, record.trial_id).is_dir():
            self._models.show_as_best(record.trial_id)
        append(self.folder / TRIALS_FILE, record_line(record))
        self._models.forget_state(record.trial_id)
        if is_best:
            self._write_best(record)

    def confirmation(self) -> dict[str, Any] | None:
        """Return what the runs that confirm have come to; None if there are none."""
        return summarize_confirmation(
            self.confirmed, self.records, self.objective, self.folder / ANSWERS_DIR
        )

    def settle_confirmed(self) -> None:
        """Make the winner of the confirmation the best, with its model."""
        best = self._find_best()
        if best in self.confirmed and best is not self.best:
            self._models.show_as_best(best.trial_id)
            self._write_best(best)

    def _beats_best(self, record: TrialRecord) -> bool:
        so_far = [record] if self.best is None else [self.best, record]
        return best_record(so_far, self.objective) is record

    def _find_best(self) -> TrialRecord | None:
        return final_best(self.records, self.objective, self.confirmed, self.confirmation())

    def _check_new(self, record: TrialRecord) -> None:
        assert record.state != "running", f"{record.trial_id} has not ended"
        assert record.trial_id not in self._ended, f"{record.trial_id} twice"
        self._ended.add(record.trial_id)

    def _write_best(self, record: TrialRecord) -> None:
        self.best = record
        self.write_text(BEST_CONFIG_FILE, self._best_config(record))

    def write_summary(self, wall_seconds: float) -> None:
        """Write `summary.json` as it is after `wall_seconds` of the program.

        At most once a second, since it looks at all trials; `close` writes the last one always.
        """
        if time.monotonic() - self._summary_at >= SECONDS_BETWEEN_SUMMARIES:
            self._write_summary(wall_seconds)
            self._summary_at = time.monotonic()

    def _write_summary(self, wall_seconds: float, ended_by: str | None = None) -> dict[str, Any]:
        summary = summarize(
            self.folder.name,
            self.records,
            self.objective,
            wall_seconds=wall_seconds,
            gpus_per_trial=self._gpus_per_trial,
            confirmed=self.confirmed,
            confirmation=self.confirmation(),
            ended_by=ended_by,
        )
        self.write_json(SUMMARY_FILE, summary)
        return summary

    def _best_config(self, record: TrialRecord) -> str:
        score = describe_accuracy(record.metrics, self.objective.metric)
        head = (
            f"# python run_single.py --config {self.folder / BEST_CONFIG_FILE}\n"
            f"# {describe_run(record)}: {self.objective.metric} {score} "
            f"after {record.samples_seen} samples\n"
        )
        return head + write_yaml(dict(record.config))


def describe_run(record: TrialRecord) -> str:
    """Return `trial 7`, or for a run that confirms it `trial 7 on seed 3`."""
    seed = f" on seed {record.config['seed']}" if record.confirms else ""
    return f"trial {record.number}{seed}"


def read_confirmed(folder: Path) -> list[TrialRecord]:
    """Return the ended runs that confirm, as `read_records` does the trials."""
    return _read(folder / CONFIRM_FILE)


def read_records(folder: Path) -> list[TrialRecord]:
    """Return the ended trials of a results folder, in the order of their end.

    A last line that was cut, by a full disk or a power loss, is left out.

    Raises:
        UserError: for any other line that is not a trial.
    """
    return _read(folder / TRIALS_FILE)


def salvage_records(path: Path) -> tuple[list[TrialRecord], list[str]]:
    """Return the trials of a file of records, and a message for each line that is none.

    For readers that want what is left of a damaged folder; nothing if there is no such file.
    """
    if not path.exists():
        return [], []
    records: list[TrialRecord] = []
    problems: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if line:
            try:
                records.append(_record(Path(path.name), number, line))
            except UserError as error:
                problems += error.messages
    return records, problems


def _read(path: Path) -> list[TrialRecord]:
    return [_record(path, number, line) for number, line in enumerate(_whole_lines(path), 1)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    return lines


def _record(path: Path, number: int, line: str) -> TrialRecord:
    try:
        return read_record(line)
    except ValueError as error:
        raise UserError(f"{path}: line {number}: is not a trial: {error}") from None


def _mend(path: Path) -> list[TrialRecord]:
    """Return the ended trials, and take away a last line that was cut."""
    records = _read(path)
    if path.exists():
        whole = "".join(f"{line}\n" for line in _whole_lines(path))
        os.truncate(path, len(whole.encode("utf-8")))
    return records


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    number = 2
    while True:
        yield folder.with_name(f"{folder.name}-{number}")
        number += 1
