"""Writes the results folder of a search or a single run, so that nothing finished is ever lost.

`trials.jsonl` grows by one line the moment a trial ends. All else follows from these lines: models,
`best/`, `best.yaml` and `summary.json` are made after them, and again at the next start if a kill
came between. `paused.jsonl` says which trials wait to go on. Whole files are written beside their
place and moved there, so a reader never sees half of one.
"""

import contextlib
import fcntl
import math
import os
import re
import shlex
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanovlm.config.search_settings import Objective
from nanovlm.config.yaml_text import parse_yaml, write_yaml
from nanovlm.errors import UserError
from nanovlm.files import (
    append,
    check_text,
    drop_cut_line,
    remove_folder,
    remove_parts,
    replace_json,
    replace_text,
)
from nanovlm.messages import RUN_ID, TrialRecord
from nanovlm.records import record_line
from nanovlm.results.confirmation import confirmation_by_what_is_left
from nanovlm.results.pareto import describe_values, values_of
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    BEST_MODEL_DIR,
    CONFIRM_FILE,
    FILES,
    FOLDERS,
    LOGS_DIR,
    PAUSED_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    FolderReader,
)
from nanovlm.results.retention import CheckpointRetention, state_dir
from nanovlm.results.summary import (
    best_record,
    busy_seconds,
    describe_accuracy,
    final_best,
    summarize,
)

LOCK_FILE = ".lock"

SECONDS_BETWEEN_SUMMARIES = 1.0

_ANSWERS = re.compile(rf"\.?({RUN_ID.pattern})\.jsonl(\.\d+)?(\.part)?")
"""Names of files of answers, finished or not."""
_LONGEST_NAME = 255
"""Bytes that file systems take."""


def choose_folder(results: Path, name: str | None, default_name: str) -> Path:
    """Return the results folder to make: `name`, or the default name with a number if it is taken.

    Raises:
        UserError: if the user named a folder that exists, or that cannot be.
    """
    check_text("--name" if name else "--results", results / (name or default_name))
    if name is None:
        return next(folder for folder in _numbered(results / default_name) if not is_there(folder))
    folder = results / name
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name: must be the plain name of a folder, got {name!r}")
    if is_there(folder):
        raise UserError(f"--name: {folder} holds results already; choose another name or remove it")
    return folder


def is_there(folder: Path) -> bool:
    """Return whether there is such a folder or file. Raises UserError if there cannot be."""
    size = len(os.fsencode(folder.name))
    if size > _LONGEST_NAME:
        raise UserError(f"--name: must not exceed {_LONGEST_NAME} bytes, got {size}: {folder}")
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"--name: {folder}: {error.strerror}") from None
    return True


def _make(folder: Path, default_name: str | None) -> tuple[Path, list[Path]]:
    """Make the folder and its `logs/`; return it and the folders above it that were made for it.

    One that has come to be meanwhile is another program's: the next number of the default name is
    taken, where there is one.
    """
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        (folder / LOGS_DIR).mkdir()
    except FileExistsError:
        if default_name is None:
            raise UserError(f"--name: {folder} exists already; choose another name") from None
        return _make(choose_folder(folder.parent, None, default_name), default_name)
    except OSError as error:
        raise UserError(f"--results: {folder} cannot be made: {error.strerror}") from None
    return folder, parents


def _discard(folder: Path, parents: list[Path]) -> None:
    """Remove what this program has made in the folder, then the folder and those above it that
    hold nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        remove_folder(folder / name)
    remove_parts(folder)
    for made in (folder, *parents):
        if any(made.iterdir()):
            return
        made.rmdir()


class ResultsStore:
    """The results folder that the running program writes."""

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        gpus_per_trial: float,
        num_models: int = 1,
        default_name: str | None = None,
    ) -> None:
        """
        Args:
            num_models: so many of the best trials keep their models.
            default_name: if nobody has asked for this folder: the name that it is numbered by. If
                another program makes the folder first, `opened` takes the next number.
        """
        self.folder = folder
        self.objective = objective
        self._gpus_per_trial = gpus_per_trial
        self.has_begun = False
        self.records: list[TrialRecord] = []
        """Of the ended trials, in the order of their end."""
        self.confirmed: list[TrialRecord] = []
        """Of the ended runs that confirm, in the order of their end."""
        self.paused: dict[int, TrialRecord] = {}
        """Of the trials that wait to go on, by number."""
        self._num_models = num_models
        self._default_name = default_name
        self._models = CheckpointRetention(folder, objective, num_models)
        self._ended: set[str] = set()
        self.best: TrialRecord | None = None
        """The trial, or the run that confirms it, that `best.yaml` and `best/` are of."""
        self.notes: list[str] = []
        """What was damaged or missing in the folder, and is made up for."""
        self._earlier_seconds = 0.0
        self._is_settled = False
        self._summary_at = -math.inf  # by time.monotonic

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Make the folder, or go on with it, for as long as the context lasts; nobody else may.

        A folder that was made for nothing, because the program ended before `begin`, is removed.

        Raises:
            UserError: if it cannot be made, or another program works in it.
        """
        parents: list[Path] = []
        if not resume:
            self.folder, parents = _make(self.folder, self._default_name)
            self._models = CheckpointRetention(self.folder, self.objective, self._num_models)
        with _open_lock(self.folder) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another program works in this folder") from None
            if resume:
                self._restore()
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
        return self._earlier_seconds

    def close(self, wall_seconds: float, ended_by: str) -> dict[str, Any]:
        """Write the last summary and return it; remove models and answers that nobody needs."""
        summary = self._write_summary(wall_seconds, ended_by)
        undecided = () if self._is_settled else [record.trial_id for record in self.confirmed]
        self._models.clean(self._ended, undecided)
        waiting = {record.trial_id for record in self.paused.values()}
        needed = {f"{trial_id}.jsonl" for trial_id in self._ended | waiting}
        for path in (self.folder / ANSWERS_DIR).glob("*"):
            if _ANSWERS.fullmatch(path.name) and path.is_file() and path.name not in needed:
                path.unlink()
        return summary

    def _restore(self) -> None:
        """Go on with what is in the folder. Raises UserError if it is damaged."""
        reader = FolderReader(self.folder)
        reader.check_kinds()
        self.records, self.confirmed = reader.ended()
        self.paused = reader.paused(self.records)
        reader.raise_if_damaged()
        for name in (TRIALS_FILE, CONFIRM_FILE):
            drop_cut_line(self.folder / name)
        if reader.has(PAUSED_FILE):  # without what is damaged, and what has gone on or ended
            self.write_text(PAUSED_FILE, "".join(map(record_line, self.paused.values())))
        remove_parts(self.folder)
        summary = reader.summary(self.records)
        self.notes += reader.notes
        if summary is not None:
            self._earlier_seconds = summary["wall_seconds"]
        else:
            self._earlier_seconds = busy_seconds([*self.records, *self.confirmed])
            self.notes.append(
                f"{SUMMARY_FILE}: how long the search ran is known by its trials alone"
            )
        self._ended = {record.trial_id for record in (*self.records, *self.confirmed)}
        self._show_best(self._find_best())
        self._models.restore(self.records)

    def write_text(self, name: str, text: str) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_text(self.folder / name, text)

    def write_json(self, name: str, content: Any) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_json(self.folder / name, content)

    def add(self, record: TrialRecord) -> None:
        """Append an ended trial or an ended run that confirms one; then all that follows from it:
        what is best, and whose models are kept."""
        self._check_new(record)
        name = CONFIRM_FILE if record.confirms else TRIALS_FILE
        append(self.folder / name, record_line(record))
        (self.confirmed if record.confirms else self.records).append(record)
        self.paused.pop(record.number, None)
        if record.confirms:
            self._show_best(self._find_best())
            remove_folder(state_dir(self.folder, record.trial_id))
            return
        # After a confirmation only the next one changes what is best.
        if not self.confirmed:
            self._show_best(self._best_with(record))
        self._models.settle(record)

    def note_pause(self, record: TrialRecord) -> None:
        """Append an open trial if it has paused, or goes on after a pause; the last line counts."""
        before = self.paused.get(record.number)
        if record.is_paused and record != before:
            append(self.folder / PAUSED_FILE, record_line(record))
            self.paused[record.number] = record
        elif before is not None and not record.is_paused:
            append(self.folder / PAUSED_FILE, record_line(record), is_synced=False)
            del self.paused[record.number]

    def confirmation(self) -> dict[str, Any] | None:
        """Return what the runs that confirm have come to; None if there are none."""
        content, problems = confirmation_by_what_is_left(
            self.confirmed, self.records, self.objective, self.folder / ANSWERS_DIR
        )
        self.notes += [problem for problem in problems if problem not in self.notes]
        return content

    def settle_confirmed(self) -> None:
        """Take note that all confirming runs are over: only the model of the best is needed."""
        self._is_settled = True

    def _best_with(self, record: TrialRecord) -> TrialRecord | None:
        """Return the best trial after this one has ended."""
        if len(self.objective.all) > 1:  # a third one may come to be the best
            return best_record(self.records, self.objective)
        so_far = [record] if self.best is None else [self.best, record]
        return best_record(so_far, self.objective)

    def _find_best(self) -> TrialRecord | None:
        return final_best(self.records, self.objective, self.confirmed, self.confirmation())

    def _show_best(self, best: TrialRecord | None) -> None:
        """Let `best/` and `best.yaml` be of the best run."""
        if best is None or best is self.best:
            return
        if not self._models.show_as_best(best.trial_id):
            self._check_shown(best)
        self.best = best
        self.write_text(BEST_CONFIG_FILE, self._best_config(best))

    def _check_shown(self, best: TrialRecord) -> None:
        """Remove a `best/` of another run than the best one, whose own model is gone."""
        model = self.folder / BEST_MODEL_DIR
        shown = FolderReader(self.folder).config(BEST_CONFIG_FILE)
        if not model.exists() or shown == parse_yaml(self._best_config(best), BEST_CONFIG_FILE):
            return
        if shown is None:
            self.notes.append(f"{model}: may be of another run than {describe_run(best)}")
            return
        remove_folder(model)
        self.notes.append(f"{model}: is gone: the model of {describe_run(best)} is not there")

    def _check_new(self, record: TrialRecord) -> None:
        assert record.end is not None, f"{record.trial_id} has not ended"
        assert record.trial_id not in self._ended, f"{record.trial_id} twice"
        self._ended.add(record.trial_id)

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
            paused=tuple(self.paused.values()),
            ended_by=ended_by,
        )
        self.write_json(SUMMARY_FILE, summary)
        return summary

    def _best_config(self, record: TrialRecord) -> str:
        score = describe_accuracy(record.metrics, self.objective.metric)
        if (values := values_of(self.objective, record)) and len(values) > 1:
            score += f" ({describe_values(self.objective, values)})"
        head = (
            f"python run_single.py --config {shlex.quote(str(self.folder / BEST_CONFIG_FILE))}\n"
            f"{describe_run(record)}: {self.objective.metric} {score} "
            f"after {record.samples_seen} samples\n"
        )
        return textwrap.indent(head, "# ") + write_yaml(dict(record.config))


def describe_run(record: TrialRecord) -> str:
    """Return `trial 7`, or for a run that confirms it `trial 7 on seed 3`."""
    seed = f" on seed {record.config['seed']}" if record.confirms else ""
    return f"trial {record.number}{seed}"


def _open_lock(folder: Path) -> IO[str]:
    try:
        (folder / LOGS_DIR).mkdir(exist_ok=True)
        return (folder / LOGS_DIR / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(f"{folder / LOGS_DIR}: cannot be written: {error.strerror}") from None


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    number = 2
    while True:
        yield folder.with_name(f"{folder.name}-{number}")
        number += 1
