"""The copy of a results folder in a bucket: it can be gone on from after each file that is written.

The folder grows while a pass of the mirror reads it, as that of a search that runs.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from nanovlm.results import mirror
from nanovlm.results.mirror import ORDER, Mirror
from nanovlm.results.read import FILES, FOLDERS, FolderReader
from nanovlm.results.remote import RemoteFolder
from tests.results.whole_folders import NUM_TRIALS, make_whole_search


def write(path: Path, text: str) -> None:
    """Replace a file as the programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.1.part")
    part.write_text(text)
    part.replace(path)


def append(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write(f"{number}\n")


def grow(folder: Path, num_trials: int) -> Iterator[None]:
    """Do what a search does with its folder; yield after each operation on a file."""
    (folder / "logs").mkdir(parents=True)
    write(folder / "space.yaml", "")
    for number in range(num_trials):
        state, model = (folder / "checkpoints" / f"{number}{end}" for end in (".state", ""))
        for operation in (
            partial(append, folder / "study.journal", number),
            partial(write, state / "state.safetensors", "1"),
            partial(append, folder / "rungs.jsonl", number),
            partial(append, folder / "paused.jsonl", number),
            partial(write, state / "state.safetensors", "2"),
            partial(write, folder / "answers" / f"{number}.jsonl", "A"),
            partial(write, model / "model.safetensors", str(number)),
            partial(append, folder / "trials.jsonl", number),
            partial(write, folder / "best" / "model.safetensors", str(number)),
            partial(write, folder / "best.yaml", str(number)),
            partial(shutil.rmtree, state),
            partial(write, folder / "summary.json", str(number + 1)),
            partial(append, folder / "logs" / "driver.log", number),
        ):
            operation()
            yield


def check(copy: Path) -> None:
    """Check that what the copy holds refers to nothing that it does not hold."""

    def lines(name: str) -> list[str]:
        text = (copy / name).read_text() if (copy / name).exists() else ""
        assert text == "" or text.endswith("\n")
        return text.splitlines()

    study, rungs, ended = lines("study.journal"), lines("rungs.jsonl"), lines("trials.jsonl")
    paused = lines("paused.jsonl")
    assert {*paused, *ended} <= {*rungs} <= {*study}
    for number in ended:
        assert (copy / "answers" / f"{number}.jsonl").exists()
        assert (copy / "checkpoints" / number / "model.safetensors").exists()
    for number in {*paused} - {*ended}:
        assert (copy / "checkpoints" / f"{number}.state" / "state.safetensors").exists()
    if (copy / "summary.json").exists():
        assert int((copy / "summary.json").read_text()) <= len(ended)
    if (copy / "best.yaml").exists():
        assert (copy / "best.yaml").read_text() in ended


@dataclass(frozen=True)
class CheckedFolder(RemoteFolder):
    """A folder that is looked at after each change, and fails now and then."""

    look: Callable[[Path], object] = check
    draws: random.Random = field(default_factory=lambda: random.Random(0))
    fails_at: float = 0.0

    def put(self, name: str, source: bytes | Path) -> None:
        if self.draws.random() < self.fails_at:
            raise OSError("the bucket is away")
        super().put(name, source)
        self.look(Path(self.path))

    def remove(self, name: str) -> None:
        super().remove(name)
        self.look(Path(self.path))


def remote_folder(path: Path, **options: object) -> CheckedFolder:
    return CheckedFolder(LocalFileSystem(), str(path), f"file://{path}", "", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(15))
def test_the_copy_can_be_gone_on_from_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draws = random.Random(seed)
    folder, copy = tmp_path / "search", tmp_path / "copy"
    growth = grow(folder, num_trials=8)
    next(growth)
    keep, burst = mirror._keep, [0]

    def keep_later(*arguments: object) -> object:
        while burst[0] and draws.random() < 0.7:
            burst[0] -= 1
            next(growth, None)
        return keep(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mirror, "_keep", keep_later)
    mirrored = Mirror(folder, remote_folder(copy, draws=draws, fails_at=0.02))
    for _ in growth:
        if draws.random() < 0.3:
            burst[0] = draws.randrange(10)
            try_to_update(mirrored)
    while not try_to_update(mirrored):
        pass
    assert files_of(copy) == files_of(folder)


def try_to_update(mirrored: Mirror) -> bool:
    try:
        mirrored.update()
    except OSError as error:
        assert str(error) == "the bucket is away"
        return False
    return True


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_whole_folder_comes_back_from_its_copy(tmp_path: Path) -> None:
    folder = make_whole_search(tmp_path / "search")
    (folder / "logs" / "ray").mkdir(exist_ok=True)
    (folder / "logs" / "ray" / "tuner.pkl").write_text("of Ray alone")
    remote = remote_folder(tmp_path / "copy", look=lambda path: None)
    Mirror(folder, remote).update()
    back = tmp_path / "back"
    mirrored = Mirror(back, remote)
    mirrored.fetch()
    kept = {name for name in files_of(folder) if not name.startswith(("logs/ray", "logs/.lock"))}
    assert files_of(back) == {name: files_of(folder)[name] for name in kept}
    reader = FolderReader(back)
    assert len(reader.ended()[0]) == NUM_TRIALS
    assert len(reader.paused(reader.ended()[0])) == 1
    reader.raise_if_damaged()
    monitored = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")}
    mirrored.update()
    assert monitored == {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("*")}
    shutil.rmtree(back)
    mirrored.update()
    assert not (tmp_path / "copy").exists(), "a folder that was discarded is not kept"


def test_every_file_of_a_results_folder_has_its_place() -> None:
    assert {*ORDER} == {*FILES, *FOLDERS}
