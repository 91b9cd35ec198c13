"""A kill between any two operations on the files of a results folder, and what is there after it.

Python tells an audit hook of each file that is opened, renamed, removed or linked. From the n-th
such event on all of them fail, as after a kill, for each n.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from nanovlm.config.search_settings import Objective
from nanovlm.config.yaml_text import read_mapping
from nanovlm.messages import Kind, TrialRecord
from nanovlm.results.retention import model_dir, state_dir
from nanovlm.results.summary import final_best
from nanovlm.results.write import ResultsStore
from tests.records import make_record

OBJECTIVE = Objective(metric="mmstar_accuracy", mode="max")
EVENTS = {
    "open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate",
    "shutil.rmtree",
}  # fmt: skip


class Killed(BaseException):
    """The program is killed."""


class Killer:
    """Lets so many events in a folder happen, and none after."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.left = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event not in EVENTS or str(self.folder) not in str(args[0]):
            return
        if event == "open" and args[1] in (None, "r", "rb"):
            return
        if self.left == 0:
            raise Killed
        self.left -= 1


killer = Killer()
sys.addaudithook(killer)


def record(number: int, accuracy: float, seed: int | None = None) -> TrialRecord:
    more: dict[str, Any] = {"config": {"lr_mp": 0.01 * (number + 1), "seed": seed or 0}}
    if seed is not None:
        more |= {"kind": Kind.CONFIRM, "trial_id": f"confirm-{number}-seed-{seed}"}
    return make_record(number, "completed", {"mmstar_accuracy": accuracy}, **more)


RECORDS = (
    record(0, 0.5), record(1, 0.8), record(2, 0.7),
    record(1, 0.6, seed=1), record(0, 0.65, seed=1), record(1, 0.8, seed=2),
)  # fmt: skip
"""The last three confirm: the winner is 1, then 0, then 1 again."""
NUM_CONFIRMING = 3


def train(folder: Path, trial: TrialRecord) -> None:
    """Write what a worker writes."""
    for folder_ in (model_dir(folder, trial.trial_id), state_dir(folder, trial.trial_id)):
        folder_.mkdir(parents=True, exist_ok=True)
        (folder_ / "model.safetensors").write_text(trial.trial_id)


def let_end(store: ResultsStore, trials: list[TrialRecord]) -> None:
    """Let trials end as in a search, and the search after them."""
    for trial in trials:
        folder, killer.folder = killer.folder, None
        train(store.folder, trial)
        killer.folder = folder
        store.take(trial)
        store.write_summary(1.0)
    store.close(2.0, "budget.trials", is_settled=True)


def content(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    # The first line of best.yaml names the folder.
    text = {str(path.relative_to(folder)): path.read_text() for path in paths}
    return text | {"best.yaml": text["best.yaml"].partition("\n")[2]}


def check_it_agrees(store: ResultsStore) -> None:
    """Check that `best.yaml` and `best/` are of the run that is best by the records."""
    folder = store.folder
    best = final_best(store.records, OBJECTIVE, store.confirmed, store.confirmation())
    assert store.best == best
    if best is None:
        assert not (folder / "best.yaml").exists() and not (folder / "best").exists()
        return
    assert read_mapping(folder / "best.yaml") == best.config
    assert (folder / "best" / "model.safetensors").read_text() == best.trial_id
    assert not any(state_dir(folder, trial.trial_id).exists() for trial in store.records)
    if len(store.confirmed) < NUM_CONFIRMING:  # the winner may still be any of them
        assert all(model_dir(folder, trial.trial_id).exists() for trial in store.confirmed)


def test_a_kill_at_any_moment_leaves_what_follows_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # takes long, and a kill needs it not
    undisturbed = ResultsStore(tmp_path / "undisturbed" / "search", OBJECTIVE, gpus_per_trial=0)
    with undisturbed.opened(resume=False):
        undisturbed.begin()
        let_end(undisturbed, [*RECORDS])
    expected = content(undisturbed.folder)
    moments = 0
    while True:
        store = ResultsStore(tmp_path / str(moments) / "search", OBJECTIVE, gpus_per_trial=0)
        try:
            with store.opened(resume=False):
                store.begin()
                killer.folder, killer.left = store.folder, moments
                let_end(store, [*RECORDS])
            break
        except Killed:
            killer.folder = None
        finally:
            killer.folder = None
        again = ResultsStore(store.folder, OBJECTIVE, gpus_per_trial=0)
        with again.opened(resume=True):
            check_it_agrees(again)
            ended = {trial.trial_id for trial in (*again.records, *again.confirmed)}
            let_end(again, [trial for trial in RECORDS if trial.trial_id not in ended])
        assert content(store.folder) == expected
        moments += 1
    assert moments > 40
