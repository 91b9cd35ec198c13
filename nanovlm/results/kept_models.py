"""Which models and training states of a results folder are kept: those that can still be needed.

`checkpoints/` holds the final models of the best trials and the states of those that run. `best/`
is a second name for the files of one of them, so it takes no disk of its own.
"""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from nanovlm.messages import TrialRecord
from nanovlm.results.summary import rank
from nanovlm.search.sections import Objective

CHECKPOINTS_DIR = "checkpoints"
BEST_MODEL_DIR = "best"
_STATE_SUFFIX = ".state"


def model_dir(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder writes its model."""
    return folder / CHECKPOINTS_DIR / trial_id


def state_dir(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder keeps the state of its training."""
    return folder / CHECKPOINTS_DIR / f"{trial_id}{_STATE_SUFFIX}"


class KeptModels:
    """Keeps the models of the best trials, and removes the others as they come."""

    def __init__(self, folder: Path, objective: Objective, num_best: int) -> None:
        """
        Args:
            num_best: so many of the best trials keep their models.
        """
        self._folder = folder
        self._objective = objective
        self._num_best = num_best
        self._best: list[TrialRecord] = []

    def restore(self, records: Sequence[TrialRecord]) -> None:
        """Take in the trials that ended before the search was interrupted."""
        for record in records:
            self._take(record)

    def settle(self, record: TrialRecord) -> None:
        """Keep or remove the model of a trial that has ended, and what it pushes out."""
        for out in self._take(record):
            shutil.rmtree(model_dir(self._folder, out.trial_id), ignore_errors=True)

    def forget_state(self, trial_id: str) -> None:
        """Remove the state of a trial whose end is recorded."""
        shutil.rmtree(state_dir(self._folder, trial_id), ignore_errors=True)

    def show_as_best(self, trial_id: str) -> None:
        """Make `best/` the model of a trial."""
        best = self._folder / BEST_MODEL_DIR
        part, previous = (self._folder / f".{BEST_MODEL_DIR}.{name}" for name in ("part", "old"))
        for leftover in (part, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        _link(model_dir(self._folder, trial_id), part)
        if best.exists():
            best.rename(previous)
        part.rename(best)
        shutil.rmtree(previous, ignore_errors=True)

    def clean(self, ended: Collection[str], confirmed: Collection[str]) -> None:
        """Remove what nobody needs after the program: models that were cut off in being written,
        and states of trials that have ended. The state of any other trial stays, to go on with.

        Args:
            ended: ids of the trials that have ended.
            confirmed: ids of the runs whose models a later run of the program still chooses from.
        """
        kept = {record.trial_id for record in self._best} | set(confirmed)
        root = self._folder / CHECKPOINTS_DIR
        for path in root.iterdir() if root.exists() else ():
            trial_id, is_state, _ = path.name.partition(_STATE_SUFFIX)
            if trial_id in ended if is_state else trial_id not in kept:
                shutil.rmtree(path)
        if root.exists() and not any(root.iterdir()):
            root.rmdir()

    def _take(self, record: TrialRecord) -> list[TrialRecord]:
        """Put an ended trial among the best; return those that are not any more."""
        if record.state != "completed":
            return [record]
        self._best = rank([*self._best, record], self._objective)
        out = self._best[self._num_best :]
        del self._best[self._num_best :]
        return out


def _link(source: Path, target: Path) -> None:
    """Make `target` a folder with the same files; a copy where the disk has no second names."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
