"""Prepared data of each test's own, and small data sets to prepare."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data import cache
from nanovlm.data.tokenizer import load_tokenizer

CONFIG = TrainConfig(
    batch_size=1,
    val_ratio=0.0,
    max_bad_fraction=0.0,
    train_dataset_path="builtin:digits",
    train_dataset_name=("default",),
    test_dataset_path="builtin:digits",
    vlm=VLMConfig(vit_img_size=32, lm_tokenizer="builtin:digits", lm_vocab_size=64),
)

Row = tuple[Any, Sequence[tuple[str | bytes | None, str | bytes | None] | None] | None]
"""A colour, stored bytes or several of them, and turns (user, assistant); None where it is null."""


@pytest.fixture(autouse=True)
def own_prepared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where all that a test prepares goes."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    monkeypatch.setattr(cache, "prepared_root", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("builtin:digits")


def change(config: TrainConfig, vlm: dict[str, Any] | None = None, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, vlm=dataclasses.replace(config.vlm, **vlm or {}), **values)


def encoded(image: Any) -> dict[str, Any] | None:
    """Return a colour as a stored image; bytes, paths and None as they are."""
    if image is None or isinstance(image, dict):
        return image
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    content = io.BytesIO()
    Image.new("RGB", (4, 4), image).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def write_rows(file: Path, rows: Sequence[Row], rows_per_group: int = 2) -> None:
    """Write training rows as the hub has them, in small row groups."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [
        None
        if images is None
        else [encoded(image) for image in (images if isinstance(images, list) else [images])]
        for images, _ in rows
    ]
    texts = [
        None
        if turns is None
        else [turn and dict(zip(("user", "assistant"), turn, strict=True)) for turn in turns]
        for _, turns in rows
    ]
    columns = {
        "images": pa.array(images, pa.list_(stored)),
        # Written as bytes and called text: so a test can have text that is none.
        "texts": pa.array(texts, _turns_of(pa.binary())).view(_turns_of(pa.string())),
    }
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)


def _turns_of(text: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct({"user": text, "assistant": text}))


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return a function that writes sub-sets to a folder and returns the config that reads it."""

    def write(**subsets: Sequence[Row]) -> TrainConfig:
        for name, rows in subsets.items():
            write_rows(tmp_path / "data" / name / "train-00000-of-00001.parquet", rows)
        return change(
            CONFIG,
            train_dataset_path=str(tmp_path / "data"),
            train_dataset_name=tuple(subsets),
        )

    return write


def write_dataset(rows: datasets.Dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(file)
