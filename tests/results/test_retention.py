"""Which models and states are on disk as trials end."""

from pathlib import Path

from nanovlm.config.search_settings import Objective
from nanovlm.messages import TrialRecord, TrialState
from nanovlm.results.retention import CheckpointRetention, model_dir, state_dir
from tests.records import make_record

OBJECTIVE = Objective(metric="mmstar_accuracy", mode="max")


def ended(
    folder: Path, number: int, accuracy: float, state: TrialState = "completed"
) -> TrialRecord:
    """A trial with a model, if it ran to its end, and a state."""
    trial_id = f"trial-{number:04d}"
    state_dir(folder, trial_id).mkdir(parents=True)
    if state == "completed":
        model_dir(folder, trial_id).mkdir()
        (model_dir(folder, trial_id) / "model.safetensors").write_text(trial_id)
    return make_record(number, state, {"mmstar_accuracy": accuracy})


def names(folder: Path) -> list[str]:
    root = folder / "checkpoints"
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def test_the_models_of_the_best_trials_stay(tmp_path: Path) -> None:
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=2)
    for number, accuracy in enumerate([0.5, 0.4, 0.7, 0.1]):
        kept.settle(ended(tmp_path, number, accuracy))
    kept.settle(ended(tmp_path, 4, 0.9, "stopped"))
    assert names(tmp_path) == ["trial-0000", "trial-0002"]


def test_they_stay_when_the_search_goes_on(tmp_path: Path) -> None:
    records = [ended(tmp_path, number, accuracy) for number, accuracy in enumerate([0.5, 0.7])]
    first = CheckpointRetention(tmp_path, OBJECTIVE, num_best=2)
    for record in records:
        first.settle(record)
    again = CheckpointRetention(tmp_path, OBJECTIVE, num_best=2)
    for record in records:
        again.settle(record)
    again.settle(ended(tmp_path, 2, 0.6))
    assert names(tmp_path) == ["trial-0001", "trial-0002"]


def test_best_takes_no_disk_of_its_own(tmp_path: Path) -> None:
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=1)
    for number, accuracy in enumerate([0.5, 0.7]):
        record = ended(tmp_path, number, accuracy)
        kept.settle(record)
        kept.show_as_best(record.trial_id)
    (file,) = (tmp_path / "best").iterdir()
    assert file.read_text() == "trial-0001"
    assert file.stat().st_ino == (model_dir(tmp_path, "trial-0001") / file.name).stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]


def test_best_is_not_made_again_where_it_is_right_already(tmp_path: Path) -> None:
    records = [ended(tmp_path, number, 0.5) for number in (0, 1)]
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=2)
    made = []
    for record in (records[0], records[0], records[1]):
        assert kept.show_as_best(record.trial_id)
        made.append((tmp_path / "best").stat().st_ino)
    assert made[0] == made[1] != made[2]


def test_what_a_kill_left_half_done_is_no_obstacle(tmp_path: Path) -> None:
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=1)
    for name in (".best.part", ".best.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    record = ended(tmp_path, 0, 0.5)
    kept.settle(record)
    kept.show_as_best(record.trial_id)
    assert (tmp_path / "best" / "model.safetensors").read_text() == "trial-0000"


def test_cleaning_leaves_what_a_later_run_needs(tmp_path: Path) -> None:
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=1)
    best = ended(tmp_path, 0, 0.5)
    kept.settle(best)
    state_dir(tmp_path, best.trial_id).mkdir()  # the program was killed before it was removed
    for name in ("trial-0001", "trial-0002.state", "confirm-0-seed-1", "confirm-0-seed-2"):
        (tmp_path / "checkpoints" / name).mkdir()
    kept.clean({best.trial_id, "confirm-0-seed-1"}, {"confirm-0-seed-1"})
    assert names(tmp_path) == ["confirm-0-seed-1", "trial-0000", "trial-0002.state"]


def test_what_the_search_has_not_made_stays(tmp_path: Path) -> None:
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=1)
    kept.settle(ended(tmp_path, 0, 0.5))
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for folder in (
        root / "mine",
        root / "trial-0003-copy",
        root / "trial-0003.state.old",
        elsewhere,
    ):
        folder.mkdir()
    (elsewhere / "model.safetensors").write_text("mine")
    (root / "notes.txt").write_text("mine")
    (root / "trial-0007").write_text("a file by the name of a model")
    for name in ("trial-0005", "trial-0000.state"):
        (root / name).symlink_to(elsewhere)
    before = names(tmp_path)
    kept.settle(make_record(5, "failed"))
    kept.clean({"trial-0000", "trial-0005"}, ())
    assert names(tmp_path) == before
    assert (elsewhere / "model.safetensors").read_text() == "mine"


def test_nothing_is_removed_through_a_link_to_the_models(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "trial-0001").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    kept = CheckpointRetention(tmp_path, OBJECTIVE, num_best=1)
    kept.settle(make_record(1, "failed"))
    kept.clean({"trial-0001"}, ())
    assert (elsewhere / "trial-0001").is_dir()
