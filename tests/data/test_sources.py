"""Rows from a folder of parquet files, and what is said when there are none."""

import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from PIL import Image

from nanovlm.data import sources
from nanovlm.data.digits import (
    digits_benchmark_rows,
    digits_training_rows,
)
from nanovlm.data.sources import load_benchmark_rows, load_training_rows
from nanovlm.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The_cauldron's layout: sub-sets `ones` (two files) and `twos`."""
    rows = digits_training_rows()
    _write(rows.select(range(0, 3)), tmp_path / "data" / "ones" / "train-00000-of-00002.parquet")
    _write(rows.select(range(3, 5)), tmp_path / "data" / "ones" / "train-00001-of-00002.parquet")
    _write(rows.select(range(5, 9)), tmp_path / "data" / "twos" / "train-00000-of-00001.parquet")
    return tmp_path / "data"


def _write(rows: datasets.Dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(file)


def test_sub_sets_come_one_after_the_other(folder: Path) -> None:
    wanted = digits_training_rows().select([5, 6, 7, 8, 0, 1, 2, 3, 4])
    rows = load_training_rows(str(folder), ("twos", "ones"))
    assert rows.features == wanted.features
    assert list(rows["texts"]) == list(wanted["texts"])
    assert [images[0].tobytes() for images in rows["images"]] == [
        images[0].tobytes() for images in wanted["images"]
    ]


def test_a_folder_without_sub_sets_is_named_default(folder: Path) -> None:
    rows = load_training_rows(str(folder / "twos"), ("default",))
    assert list(rows["texts"]) == list(digits_training_rows()["texts"])[5:9]


def test_other_columns_stay_unread(tmp_path: Path) -> None:
    rows = digits_training_rows().select(range(2))
    _write(rows.add_column("more", [1, 2]), tmp_path / "rows.parquet")
    assert load_training_rows(str(tmp_path), ("default",)).column_names == ["images", "texts"]


def test_images_are_images_without_the_types_of_datasets(tmp_path: Path) -> None:
    rows = digits_training_rows().select(range(2))
    stored = rows.with_format("arrow")[:].replace_schema_metadata({})
    datasets.Dataset(stored).to_parquet(tmp_path / "rows.parquet")
    (image,) = load_training_rows(str(tmp_path), ("default",))[0]["images"]
    assert isinstance(image, Image.Image)


def test_the_benchmark_from_a_folder(tmp_path: Path) -> None:
    wanted = digits_benchmark_rows().select(range(3))
    _write(wanted, tmp_path / "mmstar.parquet")
    rows = load_benchmark_rows(str(tmp_path))
    assert rows.features == wanted.features
    assert list(rows.remove_columns("image")) == list(wanted.remove_columns("image"))


def test_a_sub_set_that_is_not_there_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"train_dataset_name 'twoz'.*Did you mean 'twos'\?"):
        load_training_rows(str(folder), ("ones", "twoz"))


def test_a_folder_without_parquet_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no \*.parquet file in"):
        load_training_rows(str(folder), ("default",))
    with pytest.raises(UserError, match=r"test_dataset_path=.*there is no \*.parquet file in"):
        load_benchmark_rows(str(folder))


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(UserError, match="not parquet with the columns images, texts"):
        load_training_rows(str(tmp_path), ("default",))


def test_files_with_other_columns(tmp_path: Path) -> None:
    _write(digits_benchmark_rows().select(range(2)), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"the columns images, texts \(.*images"):
        load_training_rows(str(tmp_path), ("default",))


def test_digits_have_no_sub_sets() -> None:
    with pytest.raises(UserError, match=r"train_dataset_name=\['ai2d'\].*must be \[default\]"):
        load_training_rows("builtin:digits", ("ai2d",))


def test_neither_folder_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, **_: Any) -> str:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(sources, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'not/here'.*'ai2d'.*no folder not/here.*digits.yaml"):
        load_training_rows("not/here", ("ai2d",))
    with pytest.raises(UserError, match=r"'not/here'.*Couldn't reach.*digits.yaml"):
        load_benchmark_rows("not/here")


def test_no_hub_and_no_cache_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'not/here'.*HF_HOME.*HF_HUB_OFFLINE=1.*digits.yaml"):
        load_benchmark_rows("not/here")
    assert time.monotonic() - start < 5
    assert "Retrying" not in capfd.readouterr().err


def test_the_hub_is_asked_for_the_split_and_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"train": digits_training_rows(), "val": digits_benchmark_rows()}
    asked = []

    def hub(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return served[split]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(sources, "snapshot_download", lambda path, **_: "")
    assert len(load_training_rows("a/b", ("x", "y"))) == 2 * len(served["train"])
    assert len(load_benchmark_rows("c/d")) == len(served["val"])
    assert asked == [("a/b", "x", "train"), ("a/b", "y", "train"), ("c/d", None, "val")]
    served["train"] = served["val"]
    with pytest.raises(UserError, match=r"images, texts are needed, images, texts are missing"):
        load_training_rows("a/b", ("x",))
