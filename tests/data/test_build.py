"""Builds that are killed, that meet each other, and that use several processes."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.data import build_images
from nanovlm.data.build import log_progress
from nanovlm.data.cache import prepared_folders
from nanovlm.data.prepared import prepare_training
from nanovlm.errors import UserError
from nanovlm.messages import BuildProgress
from tests.data.conftest import CONFIG, change, write_rows
from tests.processes import start_command, started_processes, wait_until

NUM_ROWS = 1200

# What another process runs: several small parts, and other processes even for few images.
# A shell starts what runs in its background with Ctrl-C ignored, and a child inherits that.
# The processes for the images import this too, and are to do no more.
PROGRAM = """
if __name__ == "__main__":
    import signal
    from nanovlm.config.sources import Layer, build_config
    from nanovlm.data import build, build_images
    from nanovlm.data.prepared import prepare_training
    from nanovlm.data.tokenizer import load_tokenizer

    build_images._FEW_IMAGES, build.IMAGES_PER_PART, build.ROWS_PER_PART = 0, 16, 256
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = build_config(Layer("test", {values!r}))
    prepare_training(config, load_tokenizer("builtin:digits"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows whose images take a moment to decode; some are broken."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(20):
        content = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((512, 384)).save(content, "JPEG")
        photos.append(content.getvalue())
    photos[7] = photos[7][:1000]
    rows = [(photos[row % 20], [("this?", str(row % 10))] * (row % 3)) for row in range(NUM_ROWS)]
    write_rows(folder / "rows.parquet", rows, rows_per_group=8)
    return folder


def start(data: Path, assets: Path) -> "subprocess.Popen[str]":
    script = assets.with_suffix(".py")
    values = {
        "train_dataset_path": str(data),
        "train_dataset_name": ["default"],
        "max_bad_fraction": 0.1,
        "batch_size": 1,
        "vlm": {"vit_img_size": 224, "lm_tokenizer": "builtin:digits"},
    }
    script.write_text(PROGRAM.format(values=values))
    environment = {"HF_ASSETS_CACHE": str(assets), "PYTHONPATH": str(Path(__file__).parents[2])}
    return start_command(sys.executable, str(script), cwd=assets.parent, **environment)


def content(assets: Path) -> dict[str, str]:
    """Return a digest of every file that is prepared."""
    files = [path for path in assets.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {
        str(path.relative_to(assets)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Check that nothing that a test started runs on."""
    yield
    assert wait_until(lambda: not list(started_processes()), seconds=10), list(started_processes())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_process_left")
def test_builds_killed_at_several_moments_give_the_bytes_of_one_that_was_not(
    data: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole-assets", tmp_path / "killed-assets"
    assert start(data, whole).wait() == 0
    moments, stages, num_kills = random.Random(0), set[str](), 0
    while num_kills < 3 or stages != {"text", "images"}:
        before = notes(killed)
        process = start(data, killed)
        while notes(killed) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended before"
        stages |= {path.name.partition("-")[0] for path in notes(killed) - before}
        num_kills += 1
    assert start(data, killed).wait() == 0
    assert content(killed) == content(whole)
    assert not list(killed.rglob("parts-*"))


def notes(assets: Path) -> set[Path]:
    """Return what says that parts are done."""
    return set(assets.rglob("parts-*/text-*.npz")) | set(assets.rglob("parts-*/images-*.json"))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("no_process_left")
def test_several_programs_at_once_prepare_it_once(data: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    programs = [start(data, assets) for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0]
    assert len(list(assets.rglob("manifest.json"))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_left")
def test_ctrl_c_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    process = start(data, assets)
    while not any(path.suffix == ".json" for path in notes(assets)):
        time.sleep(0.002)
    for _ in range(2):  # an impatient user
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    started = time.monotonic()
    assert process.wait(timeout=20) != 0
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_several_processes_and_one_write_the_same(
    data: Path,
    tokenizer: Tokenizer,
    own_prepared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = of(data)
    prepare_training(config, tokenizer)
    here = content(own_prepared_data)
    (folder,) = prepared_folders()
    (folder.path / "manifest.json").unlink()
    monkeypatch.setattr(build_images, "_FEW_IMAGES", 0)
    prepare_training(config, tokenizer)
    assert content(own_prepared_data) == here


def of(data: Path) -> TrainConfig:
    return change(
        CONFIG,
        train_dataset_path=str(data),
        train_dataset_name=("default",),
        max_bad_fraction=0.1,
    )


def test_progress_covers_text_and_images(data: Path, tokenizer: Tokenizer) -> None:
    seen: list[BuildProgress] = []
    prepare_training(of(data), tokenizer, seen.append)
    text = [progress for progress in seen if progress.stage == "text"]
    images = [progress for progress in seen if progress.stage == "images"]
    assert [*text, *images] == seen
    assert (text[-1].done, text[-1].total) == (NUM_ROWS, NUM_ROWS)
    num_images = NUM_ROWS * 2 // 3
    assert [progress.done for progress in images] == sorted(progress.done for progress in images)
    assert (images[-1].done, images[-1].total) == (num_images, num_images)
    assert len(images) > 2
    seen.clear()
    prepare_training(of(data), tokenizer, seen.append)
    assert seen == []


def test_too_many_bad_images_end_the_work_early_and_keep_what_is_done(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, written = change(of(data), max_bad_fraction=0.01), list[str]()

    def counted(progress: BuildProgress) -> None:
        log_progress(progress)
        written.append(progress.stage)

    with pytest.raises(
        UserError, match=r"training data: at least \d+ of 800 .*max_bad_fraction=0\.01"
    ):
        prepare_training(config, tokenizer, counted)
    assert written.count("images") < 3
    (folder,) = prepared_folders()
    assert not folder.is_complete
    monkeypatch.setattr("nanovlm.data.text.encode_part", None)  # the text is there already
    train, _ = prepare_training(of(data), tokenizer)
    assert folder.is_complete
    assert len(train) == NUM_ROWS - NUM_ROWS // 20


def test_a_damaged_or_empty_file_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    config = change(CONFIG, train_dataset_path=str(tmp_path), train_dataset_name=("default",))
    write_rows(file, [])
    with pytest.raises(UserError, match="training data: default has no rows"):
        prepare_training(config, tokenizer)
    write_rows(file, [("red", [("this?", "1")] * 50)] * 50)
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(400) + whole[404:])  # the footer stays whole
    with pytest.raises(UserError, match=r"rows\.parquet: column \w+ of row group 0 cannot be read"):
        prepare_training(config, tokenizer)


def test_a_process_that_dies_is_an_error(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_images, "_FEW_IMAGES", 0)
    monkeypatch.setattr(build_images, "write_part", _die)
    with pytest.raises(UserError, match="a process ended unexpectedly"):
        prepare_training(of(data), tokenizer)


def _die(part: object, task: object) -> None:
    os._exit(1)
