"""A results folder as tables of pandas: `load_results("results/NAME")`.

The folder is only read, so that of a search that runs will do; load it again for what came since.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import Layer, build_config
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError, did_you_mean
from nanovlm.messages import TrialRecord
from nanovlm.results.confirmation import confirmation_and_problems
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_MODEL_DIR,
    CHECKPOINTS_DIR,
    LOGS_DIR,
    SPACE_FILE,
    TRIALS_FILE,
    Answer,
    FolderReader,
    answers_file,
    read_answer_lines,
)
from nanovlm.results.remote import local_copy
from nanovlm.results.statistics import NUM_ITEMS
from nanovlm.results.summary import final_best, recount

_TIMES = ("submitted_at", "first_step_at", "ended_at")
_RUN_COLUMNS = (
    "trial_id", "number", "state", "reason", "is_infeasible", "samples_seen", "seconds",
    "worker_group", *_TIMES,
)  # fmt: skip
_REPORT_COLUMNS = (
    "trial_id", "number", "samples_seen", "step", "seconds", "evaluation_seconds",
)  # fmt: skip
_WHOLE = ("number", "samples_seen", "step", "seed")


@dataclass(frozen=True, eq=False)
class Results:
    """What is in a results folder. The columns are the fields of docs/results.md."""

    folder: Path
    trials: pd.DataFrame
    """A row per ended trial, by number: `trial_id`, `number`, `state`, `reason`, `is_infeasible`,
    `samples_seen`, `seconds` (from its start to its last report), `worker_group`; `submitted_at`,
    `first_step_at`, `ended_at` (UTC); then a column for each searched key and for each metric.
    What a trial does not have is missing (NaN)."""
    paused: pd.DataFrame
    """A row per trial that waits to go on: the columns of `trials`."""
    reports: pd.DataFrame
    """A row per report of all of them: `trial_id`, `number`, `samples_seen`, `step`, `seconds`,
    `evaluation_seconds`, then a column for each metric and for each figure of the speed."""
    confirmed: pd.DataFrame
    """A row per ended confirming run: the columns of `trials`, and `seed`."""
    summary: Mapping[str, Any] | None
    """`summary.json`, counted anew if it is gone; None before the first trial has ended."""
    space: SearchSpace | None
    """The space that is searched; None for a single run."""
    best_config: TrainConfig | None
    """That of the best run, as in `best.yaml`; None while no trial has run its full budget."""
    notes: Sequence[str]
    """What was damaged or missing in the folder, and is restored from other files."""
    _records: Mapping[str, TrialRecord]
    """By trial id."""

    def config(self, trial_id: str) -> TrainConfig:
        """Return the configuration of a trial that has ended or waits, or of a confirming run.

        Raises UserError if there is none by that name.
        """
        if trial_id not in self._records:
            raise UserError(
                f"{self.folder}: no ended or paused trial is called {trial_id!r}."
                f"{did_you_mean(trial_id, self._records)}"
            )
        return _config(self.folder, self._records[trial_id])

    def answers(self, trial_id: str) -> pd.DataFrame:
        """Return what a trial answered at its last report, a row per question.

        The index is the benchmark's own number of the question, so two trials can be joined.

        Raises:
            UserError: there are no answers of such a trial, or they are cut.
        """
        path = answers_file(self.folder, trial_id)
        if not path.is_file():
            known = [file.stem for file in (self.folder / ANSWERS_DIR).glob("*.jsonl")]
            raise UserError(f"{path}: there is no such file.{did_you_mean(trial_id, known)}")
        lines = read_answer_lines(path)
        metrics = self._records[trial_id].metrics if trial_id in self._records else {}
        asked = metrics.get(NUM_ITEMS, len(lines))
        if len(lines) != asked:
            raise UserError(f"{path}: is cut: the trial gave {asked:.0f} answers, not {len(lines)}")
        return pd.DataFrame(lines, columns=[*Answer.__annotations__]).set_index("index")


def load_results(folder: str | Path) -> Results:
    """Return what is in the results folder of a search or a single run.

    It may be in a bucket, see `--results` of the programs.

    A last line that was cut (a full disk, a power loss) is left out.

    Raises:
        UserError: it is not a results folder, or a file of it is damaged.
    """
    folder = local_copy("folder", folder, without=(BEST_MODEL_DIR, CHECKPOINTS_DIR, LOGS_DIR))
    reader = FolderReader(folder)
    if not reader.has(SPACE_FILE, TRIALS_FILE):
        files = f"no {SPACE_FILE} and no {TRIALS_FILE}"
        raise UserError(f"{folder}: is not a results folder, it has {files}")
    ended, confirmed = reader.ended()
    paused = list(reader.paused(ended).values())
    space = reader.space(ended)
    reader.raise_if_damaged()
    trials, waiting = (sorted(some, key=lambda r: r.number) for some in (ended, paused))
    objective = space.objective if space else reader.objective()
    confirmation, problems = confirmation_and_problems(
        confirmed, ended, objective, folder / ANSWERS_DIR
    )
    summary, notes = reader.summary(ended), [*reader.notes]
    if summary is None and ended:
        summary = recount(folder, None, ended, confirmed, confirmation, objective, space, paused)
        notes += problems
    best = final_best(ended, objective, confirmed, confirmation)
    searched = [parameter.key for parameter in space.parameters] if space else []
    return Results(
        folder=folder,
        trials=_run_table(trials, searched),
        paused=_run_table(waiting, searched),
        reports=_table(_reports([*trials, *waiting]), _REPORT_COLUMNS),
        confirmed=_run_table(confirmed, ["seed", *(key for key in searched if key != "seed")]),
        summary=summary,
        space=space,
        best_config=_config(folder, best) if best else None,
        notes=notes,
        _records={record.trial_id: record for record in (*trials, *waiting, *confirmed)},
    )


def _config(folder: Path, record: TrialRecord) -> TrainConfig:
    return build_config(Layer(f"{folder}: {record.trial_id}", record.config))


def _run_table(records: Iterable[TrialRecord], more: Sequence[str]) -> pd.DataFrame:
    rows = [
        {
            **{name: getattr(r, name) for name in _RUN_COLUMNS if name != "seconds"},
            "seconds": r.reports[-1].seconds if r.reports else None,
            **r.parameters,
            **r.metrics,
            **({"seed": r.config["seed"]} if r.confirms else {}),
        }
        for r in records
    ]
    return _table(rows, (*_RUN_COLUMNS, *more))


def _reports(records: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    return [
        {
            **{name: getattr(record, name) for name in _REPORT_COLUMNS[:2]},
            **{name: getattr(report, name) for name in _REPORT_COLUMNS[2:]},
            **report.metrics,
            **({} if report.speed is None else asdict(report.speed)),
        }
        for record in records
        for report in record.reports
    ]


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Return a table of these columns and of what else the rows have, in the order of the rows."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    table = pd.DataFrame(list(rows), columns=list(names))
    for name in _TIMES:
        if name in table:
            table[name] = pd.to_datetime(table[name].astype("float64"), unit="s", utc=True)
    whole = {name: "int64" for name in _WHOLE if name in columns and table[name].notna().all()}
    return table.astype(whole)
