"""Paths as people write them, and files that hold nothing."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import run_search
import run_single
from nanovlm import cli
from nanovlm.config.sources import preset_layer
from nanovlm.config.space import load_space
from nanovlm.data.sources import benchmark_source, training_source
from nanovlm.data.tokenizer import load_tokenizer
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.files import (
    append,
    check_whole,
    find_full_disk,
    find_local_folder,
    fingerprint,
    user_path,
)
from nanovlm.models.model_files import read_json_object, weight_files
from nanovlm.results.load import load_results
from nanovlm.search.warm_start import read_earlier_trials
from tests.full_disk import files_end_at

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder(home: Path) -> None:
    assert user_path("~/a") == home / "a"
    assert user_path(Path("~")) == home
    assert [str(user_path(name)) for name in ("a/~", "./~", "/x", "~nobody-by-this-name/x")] == [
        "a/~",
        "~",
        "/x",
        "~nobody-by-this-name/x",
    ]


def test_folders_of_the_home_folder_are_found_wherever_they_are_named(home: Path) -> None:
    (home / "data").mkdir()
    with pytest.raises(UserError, match=rf"no \*\.parquet file in {home}/data"):
        training_source("~/data", ("default",))
    with pytest.raises(UserError, match=rf"no \*\.parquet file in {home}/data"):
        benchmark_source("~/data")
    with pytest.raises(UserError, match=f"{home}/data has no tokenizer.json"):
        load_tokenizer("~/data")
    assert find_folder("vlm.lm_model_type", "~/data", ("config.json",)) == home / "data"
    (home / "preset.yaml").write_text("epochs: 3")
    assert preset_layer("~/preset.yaml").values == {"epochs": 3}
    with pytest.raises(UserError, match=f"{home}/data: is not a results folder"):
        load_results("~/data")
    (home / "space.yaml").write_text(
        "preset: digits\nsearch: {lr_mp: default}\nwarm_start: ['~/earlier']"
    )
    space = load_space(home / "space.yaml")
    with pytest.raises(UserError, match="~/earlier is no results folder"):
        read_earlier_trials(space)
    (home / "earlier").mkdir()
    (home / "earlier" / "trials.jsonl").touch()
    with pytest.raises(UserError, match="~/earlier has no trial that fits this space"):
        read_earlier_trials(space)


def test_paths_on_the_command_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_search.py", "--space=~/s.yaml", "--results=~/r"])
    arguments = run_search.parse_arguments()
    assert (arguments.space, arguments.results) == (home / "s.yaml", home / "r")
    monkeypatch.setattr("sys.argv", ["run_single.py", "--config=~/best.yaml"])
    assert run_single.parse_arguments().config == home / "best.yaml"


def test_what_is_a_file_or_a_broken_link_is_no_hub_id(tmp_path: Path) -> None:
    file, link = tmp_path / "a.parquet", tmp_path / "data"
    file.touch()
    link.symlink_to(tmp_path / "moved")
    assert find_local_folder("x", str(tmp_path / "nothing")) is None
    with pytest.raises(UserError, match=r"train_dataset_path=.*a\.parquet is a file, where a fold"):
        training_source(str(file), ("default",))
    broken = rf"{link} is a symbolic link to {tmp_path}/moved, and nothing is there"
    with pytest.raises(UserError, match=f"test_dataset_path='{link}': {broken}"):
        benchmark_source(str(link))
    with pytest.raises(UserError, match=f"vlm.lm_tokenizer='{link}': {broken}"):
        load_tokenizer(str(link))
    with pytest.raises(UserError, match=f"vlm.vit_model_type='{link}': {broken}"):
        find_folder("vlm.vit_model_type", str(link), ("config.json",))


@pytest.mark.parametrize("is_link", [True, False], ids=["broken link", "LFS pointer"])
def test_files_that_are_elsewhere_are_told(tmp_path: Path, is_link: bool) -> None:
    names = ("a.parquet", "tokenizer.json", "config.json", "model.safetensors")
    for name in names:
        if is_link:
            (tmp_path / name).symlink_to("../blobs/1")
        else:
            (tmp_path / name).write_text(POINTER)
    parquet, tokenizer, config, weights = (
        f"{tmp_path / name} is "
        + (
            "a symbolic link to ../blobs/1, and"
            if is_link
            else "a pointer of Git LFS .*git lfs pull"
        )
        for name in names
    )
    with pytest.raises(UserError, match=parquet):
        training_source(str(tmp_path), ("default",))
    with pytest.raises(UserError, match=parquet):
        benchmark_source(str(tmp_path))
    with pytest.raises(UserError, match=tokenizer):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=config):
        read_json_object(tmp_path / "config.json")
    with pytest.raises(UserError, match=weights):
        weight_files(tmp_path)
    with pytest.raises(UserError) as error:
        check_whole("here", *(tmp_path / name for name in names), tmp_path / "not there")
    assert len(error.value.messages) == 4


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 2_000_000)
    second.write_bytes(first.read_bytes())
    assert fingerprint(first) == fingerprint(second)
    second.write_bytes(b"x" * 999_999 + b"y" + b"x" * 1_000_000)
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("place", [0, 10_000_000, 20_000_000, -1_000_000, -1])
def test_the_fingerprint_of_a_large_file(tmp_path: Path, place: int) -> None:
    file = tmp_path / "a"
    with file.open("wb") as stream:
        stream.truncate(16 * 2_500_000 + 2**20)  # blocks begin at multiples of 2,500,000
    before = fingerprint(file)
    with file.open("r+b") as stream:
        stream.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        stream.write(b"x")
    assert fingerprint(file) != before


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "one\n")
    with files_end_at(10), pytest.raises(OSError, match="File too large"):
        append(path, "a line that fits in part\n")  # 6 of its bytes
    assert path.read_text() == "one\n"
    append(path, "zwölf\n", is_synced=False)
    assert path.read_text() == "one\nzwölf\n"


def full(code: int = errno.ENOSPC) -> OSError:
    return OSError(code, os.strerror(code), "results/x/trials.jsonl")


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("the trial could not be told")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (full(), "[Errno 28] No space left on device: 'results/x/trials.jsonl'"),
        (full(errno.EDQUOT), "[Errno 122] Disk quota exceeded: 'results/x/trials.jsonl'"),
        (full(errno.EFBIG), "[Errno 27] File too large: 'results/x/trials.jsonl'"),
        (full(errno.EACCES), None),
        (caused_by(full()), "[Errno 28] No space left on device: 'results/x/trials.jsonl'"),
        (caused_by(ValueError("no")), None),
        # What a library in Rust says, and the last line of a traceback in another process.
        (RuntimeError("No space left on device (os error 28)"),) * 2,
        (RuntimeError("File too large (os error 27)"),) * 2,
        (RuntimeError("Traceback:\n  ...\nOSError: [Errno 28] No space left on device"),
         "OSError: [Errno 28] No space left on device"),
    ],
    ids=str,
)  # fmt: skip
def test_a_full_disk_is_found_behind_an_error(error: Exception, expected: object) -> None:
    assert find_full_disk(error) == (expected if expected is None else str(expected))


@pytest.mark.parametrize("make", [full, lambda: caused_by(full())])
def test_a_program_says_of_a_full_disk_in_a_line(
    make: Callable[[], Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it was met, such as in preparing the data."""

    def main() -> int:
        raise make()

    with pytest.raises(SystemExit) as ended:
        cli.run_program(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: the disk is full: [Errno 28] No space left on device: 'results/x/trials.jsonl'\n"
    )
