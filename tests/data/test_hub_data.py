"""Data sets and tokenizers from a hub: the real clients against a hub on this machine.

Everything is asked for a second time offline, and then comes from the caches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from nanovlm.config.schema import TrainConfig
from nanovlm.data.digits import digits_benchmark_rows, digits_tokenizer, digits_training_rows
from nanovlm.data.sources import Source, benchmark_source, pin_data, training_source
from nanovlm.data.tokenizer import load_tokenizer
from nanovlm.downloads import forget_downloads
from nanovlm.errors import UserError
from tests.fake_hub import FakeHub

CARD = """---
configs:
- config_name: ones
  data_files: [{split: train, path: ones/train-*}]
- config_name: twos
  data_files: [{split: train, path: twos/train-*}]
---
"""
BENCHMARK_CARD = """---
configs:
- config_name: val
  data_files: [{split: val, path: mmstar.parquet}]
---
"""


def go_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_downloads()
    hub.requests.clear()


def values(source: Source, column: str) -> list[Any]:
    """Return a column of all rows, in their order."""
    groups = [group for groups in source.load().values() for group in groups]
    return [value for g in groups for value in g.read(column, np.arange(g.num_rows))]


def add_training_data(hub: FakeHub, folder: Path, name: str) -> str:
    rows = digits_training_rows()
    for subset, first, last in (("ones", 0, 3), ("twos", 3, 7)):
        (folder / subset).mkdir(parents=True)
        part = rows.select(range(first, last)).add_column("more", list(range(first, last)))
        part.to_parquet(folder / subset / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return hub.add("dataset", name, folder)


def test_training_rows(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = add_training_data(hub, tmp_path / "data", "some/cauldron")
    wanted = digits_training_rows().select([3, 4, 5, 6, 0, 1, 2])
    stored = [images[0]["bytes"] for images in wanted.with_format("arrow")[:]["images"].to_pylist()]
    for _ in ("online", "offline"):
        source = training_source("some/cauldron", ("twos", "ones"))
        assert source.identity["commit"] == commit
        assert values(source, "texts") == list(wanted["texts"])
        assert [images[0]["bytes"] for images in values(source, "images")] == stored
        go_offline(hub, monkeypatch)
    assert hub.requests == []


def test_data_is_pinned_to_the_version_that_it_has(hub: FakeHub, tmp_path: Path) -> None:
    first = add_training_data(hub, tmp_path / "data", "some/versions")
    pinned = pin_data(
        TrainConfig(train_dataset_path="some/versions", test_dataset_path="builtin:digits")
    )
    assert pinned.train_dataset_path == f"some/versions@{first}"
    assert pinned.test_dataset_path == "builtin:digits"
    assert pin_data(pinned) == pinned
    source = training_source(pinned.train_dataset_path, ("ones",))
    assert source.identity == training_source("some/versions", ("ones",)).identity
    assert source.identity["commit"] == first
    assert len(values(source, "texts")) == 3


def test_a_sub_set_that_the_hub_does_not_have(hub: FakeHub, tmp_path: Path) -> None:
    add_training_data(hub, tmp_path / "data", "some/two-sub-sets")
    with pytest.raises(UserError, match=r"'some/two-sub-sets'.*'threes'.*ones"):
        training_source("some/two-sub-sets", ("threes",)).load()


def test_benchmark_rows(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = digits_benchmark_rows().select(range(5))
    (tmp_path / "benchmark").mkdir()
    wanted.to_parquet(tmp_path / "benchmark" / "mmstar.parquet")
    (tmp_path / "benchmark" / "README.md").write_text(BENCHMARK_CARD)
    hub.add("dataset", "some/mmstar", tmp_path / "benchmark")
    for _ in ("online", "offline"):
        source = benchmark_source("some/mmstar")
        for column in ("index", "question", "answer", "category", "l2_category"):
            assert values(source, column) == list(wanted[column])
        go_offline(hub, monkeypatch)
    assert hub.requests == []


def test_a_tokenizer(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    digits_tokenizer().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "model.bin").write_bytes(b"not asked for")
    hub.add("model", "some/tokenizer", tmp_path / "tokenizer")
    for _ in ("online", "offline"):
        assert load_tokenizer("some/tokenizer").to_str() == digits_tokenizer().to_str()
        assert not any("model.bin" in request for request in hub.requests)
        go_offline(hub, monkeypatch)
    assert hub.requests == []
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer='not/here'"):
        load_tokenizer("not/here")
