"""Data sets and tokenizers from a hub: the real clients against a hub on this machine.

Everything is asked for a second time offline, and then comes from the caches.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data import rows
from nanovlm.data.digits import digits_benchmark_rows, digits_tokenizer, digits_training_rows
from nanovlm.data.digits_tiles import digits_tiles_training_rows
from nanovlm.data.prepared import prepare_training
from nanovlm.data.recipes import training_recipe
from nanovlm.data.sources import Source, benchmark_source, pin_data, training_source
from nanovlm.data.tokenizer import load_tokenizer, model_tokenizer
from nanovlm.downloads import forget_downloads
from nanovlm.errors import UserError
from nanovlm.files import remove_folder
from nanovlm.messages import BuildProgress
from tests.fake_hub import FakeHub
from tests.tiny import digits_config

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


def test_streamed_rows_are_those_of_a_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, and no parquet file comes to the hub's cache."""
    monkeypatch.setattr(rows, "_REQUEST_BYTES", 2**14)
    folder = tmp_path / "data" / "ones"
    folder.mkdir(parents=True)
    file = folder / "train-00000-of-00001.parquet"
    digits_training_rows().to_parquet(file, batch_size=300)
    (tmp_path / "data" / "README.md").write_text(CARD)
    hub.add("dataset", "some/streamed", tmp_path / "data")
    streamed = training_source("some/streamed", ("ones",), stream=True)
    texts = values(streamed, "texts")
    assert len(streamed.load()["ones"]) == 5
    asked = [last - first for _, first, last in hub.ranges]
    assert max(asked) < file.stat().st_size // 3
    images = values(streamed, "images")
    cache = Path(constants.HF_HUB_CACHE) / "datasets--some--streamed"
    assert [*cache.rglob("README.md")] and not [*cache.rglob("*.parquet")]
    downloaded = training_source("some/streamed", ("ones",))
    assert downloaded.identity == streamed.identity
    assert values(downloaded, "texts") == texts and values(downloaded, "images") == images


def test_a_stream_that_breaks_off_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """After what is done, and prepares what a download prepares."""
    add_training_data(hub, tmp_path / "data", "some/broken")
    config = dataclasses.replace(
        digits_config(),
        train_dataset_path="some/broken",
        train_dataset_name=("ones", "twos"),
        stream_dataset=True,
        batch_size=2,
    )
    tokenizer = digits_tokenizer()

    def vanish(progress: BuildProgress) -> None:
        if progress.stage == "text" and progress.done == progress.total:
            repository.commits[commit] = {
                path: content for path, content in files.items() if "twos" not in path
            }

    repository = hub.repositories["dataset", "some/broken"]
    [(commit, files)] = repository.commits.items()
    with pytest.raises(UserError, match=r"some/broken/twos/train.*the hub does not give it"):
        prepare_training(config, tokenizer, vanish)
    repository.commits[commit] = files
    train, _ = prepare_training(config, tokenizer)
    downloaded = dataclasses.replace(config, stream_dataset=False)
    folders = {training_recipe(c, tokenizer).folder.path for c in (config, downloaded)}
    assert len(folders) == 1
    rows_of_both = digits_training_rows().select(range(7))
    assert len(train) < sum(len(turns) for turns in rows_of_both["texts"])
    assert len(train.images) == 7 and train.images.float().mean() > 0


def test_streamed_conversations_are_prepared_as_downloaded_ones(
    hub: FakeHub, tmp_path: Path, own_prepared_data: Path
) -> None:
    """The sizes of images come with the text, their tiles later: all rows are read twice."""
    folder = tmp_path / "data" / "ones"
    folder.mkdir(parents=True)
    conversations = digits_tiles_training_rows()
    last = len(conversations) - 1  # about two images
    conversations = conversations.select([0, 1, 5, 6, last - 1, last])
    conversations.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=4)
    (tmp_path / "data" / "README.md").write_text(CARD)
    hub.add("dataset", "some/conversations", tmp_path / "data")
    config = dataclasses.replace(
        build_config(preset_layer("digits-tiles")),
        train_dataset_path="some/conversations",
        train_dataset_name=("ones",),
        val_ratio=0.0,
        batch_size=2,
    )
    tokenizer = model_tokenizer(config.vlm)
    contents = []
    for is_streamed in (True, False):
        made = dataclasses.replace(config, stream_dataset=is_streamed)
        train, _ = prepare_training(made, tokenizer)
        assert len(train) == 6 and len(train.images) > 5 * 6
        path = training_recipe(made, tokenizer).folder.path
        contents.append({file.name: file.read_bytes() for file in path.iterdir()})
        remove_folder(path)
    assert contents[0] == contents[1]


def test_what_is_wrong_with_streamed_files(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    add_training_data(hub, folder, "some/wrong")
    (folder / "twos" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    hub.add("dataset", "some/wrong", folder)
    forget_downloads()
    with pytest.raises(UserError, match=r"some/wrong/twos/train.*is not a parquet file"):
        training_source("some/wrong", ("twos",), stream=True).load()
    (folder / "README.md").write_text(CARD.replace("ones/train-*", "twos/train*"))
    hub.add("dataset", "some/wrong", folder)
    forget_downloads()
    with pytest.raises(UserError, match=r"read the same file.*twos/train"):
        training_source("some/wrong", ("ones", "twos"), stream=True).load()


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
