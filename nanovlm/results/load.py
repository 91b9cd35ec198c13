"""A results folder as tables of pandas: `load_results("results/NAME")`.

The folder is only read, so that of a search that runs will do; load it again for what came since.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from nanovlm.config import TrainConfig
from nanovlm.config_files import Layer, build_config
from nanovlm.errors import UserError, did_you_mean
from nanovlm.files import user_path
from nanovlm.messages import TrialRecord
from nanovlm.results.store import (
    ANSWERS_DIR,
    BEST_CONFIG_FILE,
    SPACE_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    answers_file,
    read_confirmed,
    read_records,
)
from nanovlm.search.space import SearchSpace, load_space
from nanovlm.yaml_text import read_mapping

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
    reports: pd.DataFrame
    """A row per report of these trials: `trial_id`, `number`, `samples_seen`, `step`, `seconds`,
    `evaluation_seconds`, then a column for each metric and for each figure of the speed."""
    confirmed: pd.DataFrame
    """A row per ended run that confirms: the columns of `trials`, and `seed`."""
    summary: Mapping[str, Any] | None
    """`summary.json`; None before the first trial has ended."""
    space: SearchSpace | None
    """The space that is searched; None for a single run."""
    best_config: TrainConfig | None
    """That of `best.yaml`; None while no trial has run its full budget."""
    _configs: Mapping[str, Mapping[str, Any]]
    """Values by trial."""

    def config(self, trial_id: str) -> TrainConfig:
        """Return the configuration of an ended trial or of a run that confirms.

        Raises UserError if there is none by that name.
        """
        if trial_id not in self._configs:
            raise UserError(
                f"{self.folder}: no ended trial is called {trial_id!r}."
                f"{did_you_mean(trial_id, self._configs)}"
            )
        return build_config(Layer(f"{self.folder}: {trial_id}", self._configs[trial_id]))

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
        lines = [_object(path, line) for line in path.read_text(encoding="utf-8").splitlines()]
        columns = ["index", "answer", "output", "correct", "letter", "letter_nll"]
        return pd.DataFrame(lines, columns=columns).set_index("index")


def load_results(folder: str | Path) -> Results:
    """Return what is in the results folder of a search or a single run.

    A last line that was cut (a full disk, a power loss) is left out.

    Raises:
        UserError: it is not a results folder, or a file of it is damaged.
    """
    folder = user_path(folder)
    files = (SPACE_FILE, TRIALS_FILE)
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"{folder}: is not a results folder, it has no {' and no '.join(files)}")
    trials = sorted(read_records(folder), key=lambda record: record.number)
    confirmed = read_confirmed(folder)
    space = load_space(folder / SPACE_FILE) if (folder / SPACE_FILE).exists() else None
    searched = [parameter.key for parameter in space.parameters] if space else []
    summary, best = folder / SUMMARY_FILE, folder / BEST_CONFIG_FILE
    return Results(
        folder=folder,
        trials=_table([_run(record) for record in trials], (*_RUN_COLUMNS, *searched)),
        reports=_table(_reports(trials), _REPORT_COLUMNS),
        confirmed=_table(
            [{**_run(record), "seed": record.config["seed"]} for record in confirmed],
            (*_RUN_COLUMNS, "seed", *(key for key in searched if key != "seed")),
        ),
        summary=_object(summary, summary.read_text()) if summary.exists() else None,
        space=space,
        best_config=build_config(Layer(str(best), read_mapping(best))) if best.exists() else None,
        _configs={record.trial_id: record.config for record in (*trials, *confirmed)},
    )


def _run(record: TrialRecord) -> dict[str, Any]:
    fixed = {name: getattr(record, name) for name in _RUN_COLUMNS if name != "seconds"}
    seconds = record.reports[-1].seconds if record.reports else None
    return {**fixed, "seconds": seconds, **record.parameters, **record.metrics}


def _reports(records: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": record.trial_id,
            "number": record.number,
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


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged, this is not JSON: {text[:60]!r}") from None
