"""Data sets and tokenizers from a hub: the real clients against a hub on this machine.

Everything is asked for a second time offline, and then comes from the caches.
"""

from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from nanovlm.data.digits import digits_benchmark_rows, digits_tokenizer, digits_training_rows
from nanovlm.data.processors import load_tokenizer
from nanovlm.data.sources import load_benchmark_rows, load_training_rows
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


@pytest.fixture
def data_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, which `datasets` asks too, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    urls = hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", urls)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    return hub


def go_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def add_training_data(hub: FakeHub, folder: Path, name: str) -> None:
    rows = digits_training_rows()
    for subset, first, last in (("ones", 0, 3), ("twos", 3, 7)):
        (folder / subset).mkdir(parents=True)
        part = rows.select(range(first, last)).add_column("more", list(range(first, last)))
        part.to_parquet(folder / subset / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    hub.add("dataset", name, folder)


def test_training_rows(data_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_training_data(data_hub, tmp_path / "data", "some/cauldron")
    wanted = digits_training_rows().select([3, 4, 5, 6, 0, 1, 2])
    for _ in ("online", "offline"):
        rows = load_training_rows("some/cauldron", ("twos", "ones"))
        assert rows.column_names == ["images", "texts"]
        assert list(rows["texts"]) == list(wanted["texts"])
        assert [images[0].tobytes() for images in rows["images"]] == [
            images[0].tobytes() for images in wanted["images"]
        ]
        go_offline(data_hub, monkeypatch)
    assert data_hub.requests == []


def test_a_sub_set_that_the_hub_does_not_have(data_hub: FakeHub, tmp_path: Path) -> None:
    add_training_data(data_hub, tmp_path / "data", "some/two-sub-sets")
    with pytest.raises(UserError, match=r"'some/two-sub-sets'.*'threes'.*ones"):
        load_training_rows("some/two-sub-sets", ("threes",))


def test_benchmark_rows(data_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = digits_benchmark_rows().select(range(5))
    (tmp_path / "benchmark").mkdir()
    wanted.to_parquet(tmp_path / "benchmark" / "mmstar.parquet")
    (tmp_path / "benchmark" / "README.md").write_text(BENCHMARK_CARD)
    data_hub.add("dataset", "some/mmstar", tmp_path / "benchmark")
    for _ in ("online", "offline"):
        rows = load_benchmark_rows("some/mmstar")
        assert list(rows.remove_columns("image")) == list(wanted.remove_columns("image"))
        go_offline(data_hub, monkeypatch)
    assert data_hub.requests == []


def test_a_tokenizer(data_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    digits_tokenizer().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "model.bin").write_bytes(b"not asked for")
    data_hub.add("model", "some/tokenizer", tmp_path / "tokenizer")
    for _ in ("online", "offline"):
        assert load_tokenizer("some/tokenizer").to_str() == digits_tokenizer().to_str()
        assert not any("model.bin" in request for request in data_hub.requests)
        go_offline(data_hub, monkeypatch)
    assert data_hub.requests == []
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer='not/here'"):
        load_tokenizer("not/here")
