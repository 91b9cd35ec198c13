"""Writes the results folder of a search or a single run, so that nothing finished is ever lost.

`trials.jsonl` grows by one line the moment a trial ends. All else follows from these lines: models,
`best/`, `best.yaml` and `summary.json` are made after them, and again at the next start if a kill
came between. `paused.jsonl` says which trials wait to go on. Whole files are written beside their
final path and moved there, so a reader never sees half of one.
"""

import contextlib
import math
import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Objective
from nanovlm.config.yaml_text import parse_yaml, write_yaml
from nanovlm.files import (
    append,
    drop_cut_line,
    remove_folder,
    remove_parts,
    replace_json,
    replace_text,
    shown,
)
from nanovlm.messages import RUN_ID, TrialRecord
from nanovlm.records import record_line
from nanovlm.results.confirmation import confirmation_and_problems
from nanovlm.results.folder import discard_folder, locked, make_folder
from nanovlm.results.pareto import describe_values, values_of
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    BEST_MODEL_DIR,
    CONFIRM_FILE,
    PAUSED_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    FolderReader,
)
from nanovlm.results.retention import CheckpointRetention, state_dir
from nanovlm.results.statistics import describe_accuracy
from nanovlm.results.summary import best_record, busy_seconds, final_best, summarize

SECONDS_BETWEEN_SUMMARIES = 1.0

_ANSWERS = re.compile(rf"\.?({RUN_ID.pattern})\.jsonl(\.\d+)?(\.part)?")
"""Names of files of answers, finished or not."""


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
        self.has_begun = False
        """Whether the folder is kept if the program ends now."""
        self.records: list[TrialRecord] = []
        """Of the ended trials, in the order of their end."""
        self.confirmed: list[TrialRecord] = []
        """Of the ended confirming runs, in the order of their end."""
        self._ended_ids: set[str] = set()
        self.paused: dict[int, TrialRecord] = {}
        """Of the trials that wait to go on, by number."""
        self.best: TrialRecord | None = None
        """The trial, or the run that confirms it, that `best.yaml` and `best/` are of."""
        self.notes: list[str] = []
        """What was damaged or missing in the folder, and is restored."""
        self.earlier_seconds = 0.0
        """How long the search ran before it was interrupted, by its summary."""
        self._gpus_per_trial = gpus_per_trial
        self._models = CheckpointRetention(folder, objective, num_models)
        self._default_name = default_name
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
            self.folder, parents = make_folder(self.folder, self._default_name)
            self._models.folder = self.folder
        with locked(self.folder):
            if resume:
                self._restore()
            try:
                yield
            finally:
                if not resume and not self.has_begun:
                    discard_folder(self.folder, parents)

    def begin(self) -> None:
        """Keep the folder from now on."""
        self.has_begun = True

    def close(self, wall_seconds: float, ended_by: str, is_settled: bool = False) -> dict[str, Any]:
        """Write the last summary and return it; remove models and answers that nobody needs.

        Args:
            is_settled: whether all confirming runs are over: only the best model is needed then.
        """
        summary = self._summary(wall_seconds, ended_by)
        self.write_json(SUMMARY_FILE, summary)
        confirmed = {record.trial_id for record in self.confirmed}
        ended = confirmed | {record.trial_id for record in self.records}
        self._models.clean(ended, () if is_settled else confirmed)
        needed = ended | {record.trial_id for record in self.paused.values()}
        for path in (self.folder / ANSWERS_DIR).glob("*"):
            is_ours = _ANSWERS.fullmatch(path.name) and path.is_file()
            if is_ours and path.name.removesuffix(".jsonl") not in needed:
                path.unlink()
        return summary

    def _restore(self) -> None:
        """Go on with what is in the folder. Raises UserError if it is damaged."""
        reader = FolderReader(self.folder)
        reader.check_kinds()
        self.records, self.confirmed = reader.ended()
        self._ended_ids = {record.trial_id for record in [*self.records, *self.confirmed]}
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
            self.earlier_seconds = summary["wall_seconds"]
        else:
            self.earlier_seconds = busy_seconds([*self.records, *self.confirmed])
            self.notes.append(
                f"{SUMMARY_FILE}: how long the search ran is known by its trials alone"
            )
        self._show_best(self._find_best())
        for record in self.records:  # finishes what a kill has kept from being done
            self._models.settle(record)

    def write_text(self, name: str, text: str) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_text(self.folder / name, text)

    def write_json(self, name: str, content: Any) -> None:
        """Write the file `name` of the folder as a whole."""
        replace_json(self.folder / name, content)

    def take(self, *records: TrialRecord) -> None:
        """Append what has ended, has paused or goes on after a pause; then do all that follows from
        it: what is best, and whose models are kept.

        Each file is synced once, however many records there are. Of a trial in `paused.jsonl` the
        last line counts, and it counts no more when the trial has ended.
        """
        ended = [record for record in records if record.end is not None]
        twice = [record.trial_id for record in ended if record.trial_id in self._ended_ids]
        assert not twice, f"{twice} twice"
        self._note_pauses([record for record in records if record.end is None])
        self._append(CONFIRM_FILE, [record for record in ended if record.confirms])
        self._append(TRIALS_FILE, [record for record in ended if not record.confirms])
        for record in ended:
            (self.confirmed if record.confirms else self.records).append(record)
            self._ended_ids.add(record.trial_id)
            if not record.confirms:
                self.paused.pop(record.number, None)
        if ended:
            self._settle(ended)

    def _append(self, name: str, records: Sequence[TrialRecord], is_synced: bool = True) -> None:
        if records:
            append(self.folder / name, "".join(map(record_line, records)), is_synced)

    def _note_pauses(self, records: Sequence[TrialRecord]) -> None:
        """Append open trials that have paused, or go on after a pause."""
        lines = []
        for record in records:
            before = self.paused.get(record.number)
            if record.is_paused and record != before:
                lines.append(record)
                self.paused[record.number] = record
            elif before is not None and not record.is_paused:
                lines.append(record)
                del self.paused[record.number]
        is_synced = any(record.is_paused for record in lines)
        self._append(PAUSED_FILE, lines, is_synced)

    def _settle(self, ended: Sequence[TrialRecord]) -> None:
        """Do what follows from the end of these runs, which are in the folder."""
        trials = [record for record in ended if not record.confirms]
        if len(trials) < len(ended):
            self._show_best(self._find_best())
        elif not self.confirmed:  # after a confirming run only the next one changes what is best
            self._show_best(self._best_with(trials))
        for record in ended:
            if record.confirms:
                remove_folder(state_dir(self.folder, record.trial_id))
            else:
                self._models.settle(record)

    def confirmation(self) -> dict[str, Any] | None:
        """Return what the confirming runs show; None if there are none."""
        content, problems = confirmation_and_problems(
            self.confirmed, self.records, self.objective, self.folder / ANSWERS_DIR
        )
        self.notes += [problem for problem in problems if problem not in self.notes]
        return content

    def _best_with(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        """Return the best trial now that `records` are among them; of one objective without looking
        at all the others again."""
        if len(self.objective.all) > 1:
            return best_record(self.records, self.objective)
        return best_record([*filter(None, [self.best]), *records], self.objective)

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

    def write_summary(self, wall_seconds: float) -> None:
        """Write `summary.json` as it is after `wall_seconds` of the program.

        At most once a second, since it looks at all trials; `close` writes the last one always.
        """
        if time.monotonic() - self._summary_at >= SECONDS_BETWEEN_SUMMARIES:
            self.write_json(SUMMARY_FILE, self._summary(wall_seconds))
            self._summary_at = time.monotonic()

    def _summary(self, wall_seconds: float, ended_by: str | None = None) -> dict[str, Any]:
        return summarize(
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

    def _best_config(self, record: TrialRecord) -> str:
        score = describe_accuracy(record.metrics, self.objective.metric)
        if (values := values_of(self.objective, record)) and len(values) > 1:
            score += f" ({describe_values(self.objective, values)})"
        head = (
            f"python run_single.py --config {shlex.quote(shown(self.folder / BEST_CONFIG_FILE))}\n"
            f"{describe_run(record)}: {self.objective.metric} {score} "
            f"after {record.samples_seen} samples\n"
        )
        return textwrap.indent(head, "# ") + write_yaml(dict(record.config))


def describe_run(record: TrialRecord) -> str:
    """Return `trial 7`, or for a confirming run of it `trial 7 on seed 3`."""
    seed = f" on seed {record.config['seed']}" if record.confirms else ""
    return f"trial {record.number}{seed}"
