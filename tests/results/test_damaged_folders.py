"""Every file of a results folder, damaged in every way, before every reader.

What a reader then says is what it says of the whole folder, or it tells of the damage: by a
UserError or a note that names the file. It never ends in a traceback, and is never silently wrong.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nanovlm.cluster.single_run import check_same_config
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.commands.dashboard import read_space, what_study_lacks
from nanovlm.commands.push import read_summary
from nanovlm.config.sources import load_config
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.pruning.pausing_halving import build_rungs
from nanovlm.results.folder import check_same_data, check_same_space, describe_environment
from nanovlm.results.load import load_results
from nanovlm.results.read import SPACE_FILE
from nanovlm.results.summary import check_best_config
from nanovlm.results.write import ResultsStore
from nanovlm.search.forecast import past_rate
from nanovlm.search.resume import mend_search
from nanovlm.search.searcher import StudySearch
from nanovlm.search.study import show_study
from nanovlm.search.warm_start import read_earlier_trials
from nanovlm.training.state import read_state, write_state
from nanovlm.watch.report.folder import read_search
from tests.results.fake_records import MILESTONES
from tests.results.whole_folders import (
    DATA_MADE,
    NUM_TRIALS,
    OBJECTIVE,
    SINGLE_CONFIG,
    STATE_BELONGS_TO,
    make_whole_search,
    make_whole_single,
)

pytestmark = pytest.mark.slow

STATE = f"checkpoints/trial-{NUM_TRIALS:04d}.state/state.safetensors"

SEARCH_FILES = (
    "space.yaml", "data.json", "trials.jsonl", "confirm.jsonl", "paused.jsonl", "rungs.jsonl",
    "study.journal", "study.id", "summary.json", "best.yaml", "best/config.json",
    "best/model.safetensors", "environment.json", "answers/trial-0000.jsonl",
    "answers/confirm-0-seed-1.jsonl", STATE, "wandb/search-id", "wandb/finished-trials",
    "report.html", "logs/driver.log",
)  # fmt: skip
SINGLE_FILES = (
    "config.yaml", "data.json", "summary.json", "environment.json",
    "checkpoints/trial-0000.state/state.safetensors", "logs/driver.log",
)  # fmt: skip
FOLDERS = ("answers", "best", "checkpoints", "tensorboard", "wandb", "logs")


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_in_the_last_line(path: Path) -> None:
    os.truncate(path, max(0, path.stat().st_size - 7))


def garbled(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(200))


def garbled_in_the_middle(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff\x00{" + content[middle + 3 :])


def of_another_type(path: Path) -> None:
    path.write_text('[1, {"a": null}]\n')


def of_other_fields(path: Path) -> None:
    path.write_text('{"a": null}\n')


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def locked(path: Path) -> None:
    path.chmod(0)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    gone, empty, cut_in_the_middle, cut_in_the_last_line, garbled, garbled_in_the_middle,
    of_another_type, of_other_fields, a_folder, locked,
)  # fmt: skip


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("something")


Damage = Callable[[Path], None]


class Seen(NamedTuple):
    """What a reader has seen of a folder."""

    content: Any
    told: Sequence[str] = ()
    """What it says about damage."""


Reader = Callable[[Path, SearchSpace], Seen]


# ---------------------------------------------------------------------- the readers


def loaded(folder: Path, space: SearchSpace) -> Seen:
    results = load_results(folder)
    answers = [
        [*results.answers(trial_id)["correct"]] for trial_id in ("trial-0000", "confirm-0-seed-1")
    ]
    tables = [
        table.to_csv()
        for table in (results.trials, results.paused, results.reports, results.confirmed)
    ]
    assert results.summary is not None
    best = results.summary["best"]["trial_id"]
    content = (tables, best, results.summary["trials"], results.best_config, answers)
    return Seen(content, results.notes)


def reported(folder: Path, space: SearchSpace) -> Seen:
    search = read_search(folder)
    verdicts = sorted((d.number, d.milestone, d.value, d.goes_on) for d in search.decisions)
    assert search.best is not None
    content = (
        [*search.records], [*search.confirmed], [*search.paused], verdicts, search.space,
        search.confirmation, search.best.trial_id, dict(search.data), search.is_search,
        dict(search.environment).keys() or {*describe_environment()},  # earlier versions wrote none
    )  # fmt: skip
    return Seen(content, search.missing)


def shown(folder: Path, space: SearchSpace) -> Seen:
    study = show_study(read_space(folder, None), folder)
    (only,) = study.get_all_studies()
    trials = study.get_all_trials(only._study_id)
    content = [(t.number, t.state, t.value, t.params) for t in trials]
    return Seen(content, what_study_lacks(study, folder))


def learnt_from(folder: Path, space: SearchSpace) -> Seen:
    (earlier,) = read_earlier_trials(
        space.__class__(**vars(space) | {"warm_start": (str(folder),)})
    )
    return Seen((earlier.records, earlier.left_out), earlier.notes)


def timed(folder: Path, space: SearchSpace) -> Seen:
    rate, damaged = past_rate(space, folder.parent)
    return Seen(rate and (rate.samples_per_second, rate.evaluation_seconds), tuple(damaged))


def run_again(folder: Path, space: SearchSpace) -> Seen:
    check_best_config(folder / "best.yaml")
    return Seen(load_config(folder / "best.yaml", None, {}))


def generated(folder: Path, space: SearchSpace) -> Seen:
    model = VisionLanguageModel.from_pretrained(folder / "best")
    return Seen([float(p.detach().sum()) for p in model.parameters()])


def pushed(folder: Path, space: SearchSpace) -> Seen:
    return Seen(read_summary(folder / "best"))


def state_read(folder: Path, space: SearchSpace) -> Seen:
    state = (folder / STATE).parent
    found = read_state(state, STATE_BELONGS_TO)
    if isinstance(found, str):
        return Seen(None, [found])
    if found is None:
        return Seen(None, [str(state)])
    write_state(state, found.training, found.reports, STATE_BELONGS_TO)
    return Seen((found.training.step, found.reports))


def resumed(folder: Path, space: SearchSpace) -> Seen:
    """Do what `run_plan` does with `resume`, but for the trials."""
    check_same_space(folder, space)
    unchecked = check_same_data(folder, DATA_MADE)
    store = ResultsStore(folder, OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=True):
        mended = mend_search(space, folder, MILESTONES, store.records)
        seconds = store.earlier_seconds
        rungs = build_rungs(space, MILESTONES, folder / "rungs.jsonl")
        searcher = StudySearch(space, folder, 1, StopSwitch(), MILESTONES, store.records)
        verdicts = rungs._decisions
        study = searcher.study.get_trials()
        store.close(seconds, "budget.trials: all trials are done")
        content = (
            store.records, store.confirmed, store.paused, store.best,
            sorted((v.number, v.milestone, v.value, v.goes_on) for v in verdicts.values()),
            sorted(trial.user_attrs["number"] for trial in study),
            [opened.number for opened in searcher._to_run],
            300 < seconds < 1200,
            load_config(folder / "best.yaml", None, {}),
            sorted(path.name for path in (folder / "best").iterdir()),
        )  # fmt: skip
    return Seen(content, [*unchecked, *mended, *store.notes])


def single_resumed(folder: Path, space: SearchSpace) -> Seen:
    """Do what `run_single` does with `resume`, but for the training."""
    check_same_config(folder, SINGLE_CONFIG)
    unchecked = check_same_data(folder, DATA_MADE)
    store = ResultsStore(folder, OBJECTIVE, gpus_per_trial=0)
    with store.opened(resume=True):
        store.close(store.earlier_seconds, "interrupted")
        content = (store.records, store.earlier_seconds)
    return Seen(content, [*unchecked, *store.notes])


def single_reported(folder: Path, space: SearchSpace) -> Seen:
    search = read_search(folder)
    content = ([*search.records], dict(search.data), search.is_search)
    notes = [note for note in search.missing if "trials.jsonl" not in note]  # there is none yet
    return Seen(content, notes)


def single_state_read(folder: Path, space: SearchSpace) -> Seen:
    found = read_state(folder / "checkpoints" / "trial-0000.state", STATE_BELONGS_TO)
    if found is None or isinstance(found, str):
        return Seen(None, [found or "checkpoints: there is no state, the run begins again"])
    return Seen(found.reports)


SINGLE_READERS: Sequence[Reader] = (single_reported, single_state_read, single_resumed)

READERS: Sequence[Reader] = (
    loaded, reported, shown, learnt_from, timed, run_again, generated, pushed, state_read, resumed,
)  # fmt: skip
"""The last one writes too."""

# ---------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole_search(tmp_path_factory.mktemp("whole") / "search")


@pytest.fixture(scope="module")
def whole_single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole_single(tmp_path_factory.mktemp("single") / "search")


@pytest.fixture(scope="module")
def space(whole: Path) -> SearchSpace:
    return load_space(whole / SPACE_FILE)


class Undamaged(NamedTuple):
    """What a reader sees of a whole folder."""

    seen: Seen
    opened: set[str]
    """The files that it opens."""


_opened: list[str] = []
sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if event == "open" else None)


def read_undamaged(
    readers: Sequence[Reader], whole: Path, folder: Path, space: SearchSpace
) -> dict[str, Undamaged]:
    shutil.copytree(whole, folder)
    undamaged = {}
    for reader in readers:
        _opened.clear()
        seen = reader(folder, space)
        assert not seen.told, f"{reader.__name__}: {seen.told}"
        names = {path.removeprefix(f"{folder}/") for path in _opened}
        undamaged[reader.__name__] = Undamaged(seen, names)
    return undamaged


@pytest.fixture(scope="module")
def undamaged(
    whole: Path, space: SearchSpace, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Undamaged]:
    return read_undamaged(READERS, whole, tmp_path_factory.mktemp("u") / "search", space)


@pytest.fixture(scope="module")
def undamaged_single(
    whole_single: Path, space: SearchSpace, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Undamaged]:
    folder = tmp_path_factory.mktemp("u") / "search"
    return read_undamaged(SINGLE_READERS, whole_single, folder, space)


def outcome(reader: Reader, folder: Path, space: SearchSpace, whole: Seen, file: str) -> str:
    """Return what became of the reader: `same`, `told`, `silent` or a traceback's last line."""
    try:
        seen = reader(folder, space)
    except UserError as error:
        told: Sequence[str] = error.messages
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    else:
        if seen.content == whole.content:
            return "same"
        told = seen.told
    parts = {file, Path(file).name, *map(str, Path(file).parents)} - {"."}
    return "told" if any(part in text for part in parts for text in told) else f"silent: {told}"


def outcomes(
    readers: Sequence[Reader],
    whole: Path,
    folder: Path,
    space: SearchSpace,
    undamaged: Mapping[str, Undamaged],
    file: str,
    damage: Damage,
) -> Mapping[str, str]:
    """Damage a copy of the folder; return what became of the readers that went wrong.

    What is in a file matters only to who opens it (the opening of tensors is not seen); that it is
    there, to all.
    """
    if damage is locked and os.geteuid() == 0:
        pytest.skip("root reads everything")
    shutil.copytree(whole, folder)
    damage(folder / file)
    matters_to_all = damage in (gone, a_folder, a_file) or file.endswith(".safetensors")
    found = {
        reader.__name__: outcome(reader, folder, space, undamaged[reader.__name__].seen, file)
        for reader in readers
        if matters_to_all or file in undamaged[reader.__name__].opened
    }
    return {name: text for name, text in found.items() if text not in ("same", "told")}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", SEARCH_FILES)
def test_a_damaged_file_of_a_search(
    tmp_path: Path,
    whole: Path,
    space: SearchSpace,
    undamaged: Mapping[str, Undamaged],
    file: str,
    damage: Damage,
) -> None:
    wrong = outcomes(READERS, whole, tmp_path / "search", space, undamaged, file, damage)
    if damage is garbled_in_the_middle and file == "best/model.safetensors":
        wrong = {**wrong, "generated": "same"}  # other weights: they have no checksum
    assert {text for text in wrong.values()} <= {"same"}, wrong


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", SINGLE_FILES)
def test_a_damaged_file_of_a_single_run(
    tmp_path: Path,
    whole_single: Path,
    space: SearchSpace,
    undamaged_single: Mapping[str, Undamaged],
    file: str,
    damage: Damage,
) -> None:
    folder = tmp_path / "search"
    assert (
        outcomes(SINGLE_READERS, whole_single, folder, space, undamaged_single, file, damage) == {}
    )


@pytest.mark.parametrize("damage", [gone, a_file], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_gone_or_a_file(
    tmp_path: Path,
    whole: Path,
    space: SearchSpace,
    undamaged: Mapping[str, Undamaged],
    name: str,
    damage: Damage,
) -> None:
    assert outcomes(READERS, whole, tmp_path / "search", space, undamaged, name, damage) == {}
