"""Which models and training states of a results folder are kept: those that can still be needed.

`checkpoints/` holds the final models of the best trials and the states of those that run. `best/`
is a second name for the files of one of them, so it takes no disk of its own.
"""

import filecmp
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from nanovlm.config.search_settings import Objective
from nanovlm.files import remove_folder
from nanovlm.messages import RUN_ID, TrialRecord
from nanovlm.results.pareto import choose
from nanovlm.results.read import BEST_MODEL_DIR, CHECKPOINTS_DIR
from nanovlm.results.summary import rank

_STATE_SUFFIX = ".state"


def model_dir(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder writes its model."""
    return folder / CHECKPOINTS_DIR / trial_id


def state_dir(folder: Path, trial_id: str) -> Path:
    """Return where a trial of the results folder keeps the state of its training."""
    return folder / CHECKPOINTS_DIR / f"{trial_id}{_STATE_SUFFIX}"


class CheckpointRetention:
    """Keeps the models of the best trials, and removes the others as they come."""

    def __init__(self, folder: Path, objective: Objective, num_best: int) -> None:
        """
        Args:
            num_best: so many of the best trials keep their models; with several objectives those on
                the front do, since any of them may come to be the one that is chosen.
        """
        self.folder = folder
        self._objective = objective
        self._num_best = num_best
        self._best: list[TrialRecord] = []
        self._shown: str | None = None
        """The run that `best/` is of."""

    def settle(self, record: TrialRecord) -> None:
        """Keep or remove the model of a trial that has ended, and what it pushes out; remove its
        state."""
        remove_folder(state_dir(self.folder, record.trial_id))
        candidates = [*self._best, record]
        self._best = self._worth_keeping([r for r in candidates if r.state == "completed"])
        for out in candidates:
            if out not in self._best:
                remove_folder(model_dir(self.folder, out.trial_id))

    def show_as_best(self, trial_id: str) -> bool:
        """Make `best/` the model of a run; return whether it is, False if that model is gone."""
        source, best = model_dir(self.folder, trial_id), self.folder / BEST_MODEL_DIR
        part, previous = (self.folder / f".{BEST_MODEL_DIR}.{name}" for name in ("part", "old"))
        for leftover in (part, previous):
            remove_folder(leftover)
        if not source.is_dir():
            return False
        self._shown = trial_id
        if best.is_dir() and _is_same(source, best):  # a copy may take long
            return True
        try:
            shutil.copytree(source, part, copy_function=os.link)
        except OSError:  # a disk without second names
            remove_folder(part)
            shutil.copytree(source, part)
        if best.exists():
            best.rename(previous)
        part.rename(best)
        remove_folder(previous)
        return True

    def clean(self, ended: Collection[str], confirmed: Collection[str]) -> None:
        """Remove what nobody needs after the program: models that were cut off in being written,
        and states of runs that have ended. The state of any other trial stays, to go on with.

        Args:
            ended: ids of the runs that have ended.
            confirmed: ids of the runs whose models a later run of the program still chooses from.
        """
        kept = {record.trial_id for record in self._best} | {*confirmed, self._shown}
        root = self.folder / CHECKPOINTS_DIR
        for path in root.iterdir() if root.is_dir() else ():
            run_id, is_state = path.name.removesuffix(_STATE_SUFFIX), path.suffix == _STATE_SUFFIX
            if RUN_ID.fullmatch(run_id) and (run_id in ended if is_state else run_id not in kept):
                remove_folder(path)
        if root.is_dir() and not root.is_symlink() and not any(root.iterdir()):
            root.rmdir()

    def _worth_keeping(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        if len(self._objective.all) == 1:
            return rank(records, self._objective)[: self._num_best]
        choice = choose(records, self._objective)
        worth = [] if choice is None else [choice.record, *choice.front]
        return [record for record in records if record in worth]


def _is_same(source: Path, best: Path) -> bool:
    """Return whether the folders hold the same files, by their sizes and times if these agree."""
    compared = filecmp.dircmp(source, best)
    differing = compared.left_only, compared.right_only, compared.diff_files, compared.funny_files
    return not any(differing)
