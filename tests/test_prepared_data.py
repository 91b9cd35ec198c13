"""The command that lists and deletes prepared data, and how its making is shown."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from rich.console import Console

from nanovlm.__main__ import main
from nanovlm.data.cache import ABOUT_FILE, MANIFEST_FILE, PreparedFolder, prepared_folders
from nanovlm.errors import UserError
from nanovlm.messages import BuildProgress
from nanovlm.watch.terminal.console import PreparationDisplay
from nanovlm.watch.terminal.tables import describe_data

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a place for prepared data with a complete folder and an unfinished one."""
    monkeypatch.setattr("nanovlm.data.cache.prepared_root", lambda: tmp_path)
    for name, cutoff in (("complete", None), ("unfinished", 100)):
        about = {"what": "training data", "path": f"some/{name}", "data_cutoff_idx": cutoff}
        folder = PreparedFolder(tmp_path / name, about)
        folder.path.mkdir()
        folder.write_json(ABOUT_FILE, about)
        (folder.path / "images.bin").write_bytes(bytes(2_000_000))
        if name == "complete":
            folder.write_json(MANIFEST_FILE, {"images": 7, "samples": 31})
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert main(["data", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_what_is_not_prepared_data_is_not_deleted(root: Path, run: Callable[..., str]) -> None:
    (root / "complete" / "notes.txt").write_text("mine")
    (root / "complete" / "parts-1").symlink_to(root / "unfinished")
    with pytest.raises(UserError, match=r"stays: notes\.txt, parts-1"):
        run("delete", "complete")
    assert (root / "complete" / "notes.txt").read_text() == "mine"
    assert (root / "unfinished" / "images.bin").exists()
    assert not (root / "complete" / "images.bin").exists()


@pytest.mark.parametrize("content", ["", '{"what": ', "[]"])
def test_damaged_prepared_data_is_named_and_can_be_deleted(
    root: Path, run: Callable[..., str], content: str
) -> None:
    (root / "complete" / MANIFEST_FILE).write_text(content or "{")
    with pytest.raises(UserError, match=r"manifest\.json: is damaged .* delete complete`"):
        PreparedFolder(root / "complete", {}).manifest()
    (root / "complete" / MANIFEST_FILE).unlink()
    (root / "complete" / ABOUT_FILE).write_text(content)
    assert "about.json is damaged" in run("list").replace("\n", " ")
    assert "deleted complete" in run("delete", "complete")


@pytest.mark.usefixtures("root")
def test_the_list_shows_what_there_is(run: Callable[..., str]) -> None:
    head, complete, unfinished, total = (line.rstrip() for line in run("list").splitlines())
    assert head.split() == ["key", "GB", "images", "samples", "state", "made", "what", "from"]
    assert complete.split()[:5] == ["complete", "0.002", "7", "31", "complete"]
    assert complete.endswith("some/complete")
    assert unfinished.split()[:3] == ["unfinished", "0.002", "unfinished"]
    assert unfinished.endswith("some/unfinished, 100 rows")
    assert total.startswith("2 in ")


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["complete"], {"unfinished"}),
        (["--unfinished"], {"complete"}),
        (["--unfinished", "complete"], set()),
        (["--all"], set()),
    ],
)
def test_what_is_named_is_deleted(
    root: Path, run: Callable[..., str], arguments: list[str], left: set[str]
) -> None:
    said = run("delete", *arguments)
    assert {path.name for path in root.iterdir() if path.is_dir()} == left
    for name in {"complete", "unfinished"} - left:
        assert f"deleted {name}: 0.002 GB" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give keys of `list`, --unfinished or --all"),
        (["compleet", "x"], "there is no 'compleet'. Did you mean 'complete'"),
    ],
)
def test_nothing_is_deleted_by_mistake(
    root: Path, run: Callable[..., str], arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        run("delete", *arguments)
    assert message in str(error.value)
    assert len(prepared_folders()) == 2


def test_what_is_being_made_is_not_deleted(root: Path, run: Callable[..., str]) -> None:
    lock = filelock.FileLock(root / "unfinished.lock")
    with lock, pytest.raises(UserError, match="another program is preparing this data"):
        run("delete", "unfinished")
    assert len(prepared_folders()) == 2


def test_as_a_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanovlm", "data", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "HF_ASSETS_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    done = command("list")
    assert (done.returncode, done.stdout) == (0, f"0 in {tmp_path}/nanovlm/prepared\n")
    done = command("delete")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: delete: give keys of `list`, --unfinished or --all\n"
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "nanovlm", "data", "list"],
        cwd=REPOSITORY,
        env={**os.environ, "HF_ASSETS_CACHE": str(tmp_path / "file")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: HF_ASSETS_CACHE (else HF_HOME/assets): no folder can be")


def test_what_was_left_out_is_said_in_a_line() -> None:
    subset = {"rows": 5, "over_long_turns": 0, "incomplete_turns": 0, "samples": 7}
    training: dict[str, Any] = {
        "rows": 10,
        "samples": 14,
        "subsets": {"a": subset, "b": subset},
        "bad_rows": [],
    }
    data = {"training": training, "benchmark": {"samples": 3}}
    assert describe_data(data) == "data: 14 samples of 10 rows, 3 questions"
    training["subsets"]["b"] = subset | {"over_long_turns": 6, "samples": 0}
    training["subsets"]["a"] = subset | {"rows_without_image": 2, "rows_without_turns": 3}
    training["bad_rows"] = [{"subset": "a", "row": 1, "reason": "truncated"}]
    assert describe_data(data) == (
        "data: 14 samples of 10 rows, 3 questions; "
        "left out: 6 over-long turns, 3 rows without turns, 2 rows without an image, "
        "1 unreadable rows, all of b (data.json)"
    )


def shown(is_terminal: bool, seconds_between_lines: float) -> str:
    """Return what is written while images are prepared."""
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    with PreparationDisplay(console, seconds_between_lines=seconds_between_lines) as display:
        for done in (256, 512, 600):
            progress = BuildProgress(what="training data", stage="images", done=done, total=600)
            display.update(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_a_bar_with_count_and_rate() -> None:
    text = shown(is_terminal=True, seconds_between_lines=0)
    assert "preparing the training data: images" in text
    assert "600/600" in text and "/s" in text


def test_a_file_gets_a_line_now_and_then() -> None:
    assert shown(is_terminal=False, seconds_between_lines=0).splitlines() == [
        f"preparing the training data: images, {done} of 600" for done in (256, 512, 600)
    ]
    assert shown(is_terminal=False, seconds_between_lines=100) == ""
