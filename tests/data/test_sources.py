"""Rows from folders of parquet files, and what is said when there are none."""

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovlm.data import rows as rows_module
from nanovlm.data.digits import digits_benchmark_rows, digits_training_rows
from nanovlm.data.rows import Subsets, divide, num_rows, row_groups
from nanovlm.data.sources import Source, benchmark_source, training_source
from nanovlm.errors import UserError
from tests.data.conftest import write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The_cauldron's layout: sub-sets `ones` (two files) and `twos`."""
    rows = digits_training_rows()
    data = tmp_path / "data"
    write_dataset(rows.select(range(0, 3)), data / "ones" / "train-00000-of-00002.parquet")
    write_dataset(rows.select(range(3, 5)), data / "ones" / "train-00001-of-00002.parquet")
    write_dataset(rows.select(range(5, 9)), data / "twos" / "train-00000-of-00001.parquet")
    return data


def values(subsets: Subsets, column: str, rows: Any = None) -> list[Any]:
    if rows is None:
        rows = range(sum(map(num_rows, subsets.values())))
    [part] = divide(subsets, np.array(rows), 1000)
    return [value for some in part for value in some.group.read(column, some.rows)]


def load(source: Source, column: str) -> list[Any]:
    return values(source.load(), column)


def test_sub_sets_come_one_after_the_other(folder: Path) -> None:
    wanted = digits_training_rows().select([5, 6, 7, 8, 0, 1, 2, 3, 4])
    subsets = training_source(str(folder), ("twos", "ones")).load()
    assert [(name, num_rows(groups)) for name, groups in subsets.items()] == [
        ("twos", 4),
        ("ones", 5),
    ]
    assert values(subsets, "texts") == list(wanted["texts"])
    stored = wanted.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert [row[0]["bytes"] for row in values(subsets, "images")] == [
        row[0]["bytes"] for row in stored["images"]
    ]


def test_chosen_rows_are_read_across_files_and_row_groups(tmp_path: Path) -> None:
    numbers = pa.table({"number": pa.array(range(40))})
    pq.write_table(numbers.slice(0, 25), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(numbers.slice(25), tmp_path / "b.parquet", row_group_size=100)
    groups = [*row_groups(tmp_path / "a.parquet"), *row_groups(tmp_path / "b.parquet")]
    assert [group.num_rows for group in groups] == [7, 7, 7, 4, 15]
    subsets = {"x": groups}
    rows = [0, 6, 7, 20, 24, 25, 39]
    assert values(subsets, "number", rows) == rows
    [part] = divide(subsets, np.array(rows), 1000)
    assert [(some.first, some.rows.tolist()) for some in part] == [
        (0, [0, 6]),
        (2, [0]),
        (3, [6]),
        (4, [3]),
        (5, [0, 14]),
    ]


def test_a_large_row_group_is_divided(tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": pa.array(range(40))}), tmp_path / "a.parquet")
    subsets = {"x": row_groups(tmp_path / "a.parquet")}
    rows = [*range(0, 40, 2)]
    parts = divide(subsets, np.array(rows), 8)
    assert [[(chosen.first, len(chosen.rows)) for chosen in part] for part in parts] == [
        [(0, 8)],
        [(8, 8)],
        [(16, 4)],
    ]
    read = [v for part in parts for c in part for v in c.group.read("number", c.rows)]
    assert read == rows


def test_few_large_values_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_BATCH_BYTES", 50_000)
    noise = [np.random.default_rng(row).bytes(10_000) for row in range(20)]
    images = [[{"bytes": content, "path": None}] for content in noise]
    pq.write_table(pa.table({"small": range(20), "images": images}), tmp_path / "a.parquet")
    (group,) = row_groups(tmp_path / "a.parquet")
    metadata = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    assert rows_module._batch_size(metadata, "images") == 4
    assert rows_module._batch_size(metadata, "small") == 64
    assert list(group.read("images", np.arange(1, 20, 3))) == images[1::3]


def test_a_folder_without_sub_sets_is_named_default(folder: Path) -> None:
    source = training_source(str(folder / "twos"), ("default",))
    assert load(source, "texts") == list(digits_training_rows()["texts"])[5:9]


def test_rows_without_the_types_of_datasets_and_with_other_columns(tmp_path: Path) -> None:
    # As FineVision: no `source` in the turns, and ratings beside them.
    rows = digits_training_rows().select(range(2))
    texts = [
        [{"user": turn["user"], "assistant": turn["assistant"]} for turn in row]
        for row in rows["texts"]
    ]
    table = pa.table(
        {
            "images": rows.with_format("arrow")[:]["images"],
            "texts": texts,
            "source": ["a", "b"],
            "relevance_ratings": [[5], [4]],
            "relevance_min": [5, 4],
        }
    )
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "rows.parquet")
    source = training_source(str(tmp_path), ("default",))
    assert load(source, "texts") == texts
    assert load(source, "images")[0][0]["bytes"].startswith(b"\x89PNG")


def test_images_that_have_no_path_at_all(tmp_path: Path) -> None:
    rows = {"images": [[{"bytes": b"1", "path": None}]], "texts": [[{"user": "", "assistant": ""}]]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")  # pyarrow types the paths as null
    source = training_source(str(tmp_path), ("default",))
    assert load(source, "images") == rows["images"]


def test_the_benchmark_from_a_folder(tmp_path: Path) -> None:
    wanted = digits_benchmark_rows().select(range(3))
    write_dataset(wanted, tmp_path / "mmstar.parquet")
    subsets = benchmark_source(str(tmp_path)).load()
    for column in ("index", "question", "answer", "category", "l2_category"):
        assert values(subsets, column) == list(wanted[column])


def test_the_identity_changes_with_the_files_and_not_with_the_place(folder: Path) -> None:
    def identity() -> Any:
        return training_source(str(folder), ("ones", "twos")).identity

    before = identity()
    assert identity() == before
    assert training_source(str(folder), ("twos", "ones")).identity != before
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert training_source(str(moved), ("ones", "twos")).identity == before
    os.utime(moved / "twos" / "train-00000-of-00001.parquet", (1, 1))
    assert training_source(str(moved), ("ones", "twos")).identity != before


def test_sub_sets_that_are_not_there_are_all_named(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        training_source(str(folder), ("ones", "twoz", "onez"))
    twos, ones = error.value.messages
    assert "train_dataset_name 'twoz'" in twos and "Did you mean 'twos'?" in twos
    assert "train_dataset_name 'onez'" in ones and "Did you mean 'ones'?" in ones


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ones", "./ones"), "'ones' and './ones' read the same file"),
        (("ones", "twos/../ones"), "'ones' and 'twos/../ones' read the same file"),
        (("twos", "link"), "'twos' and 'link' read the same file"),
        (("twos", "file"), "'twos' and 'file' read the same file"),
    ],
)
def test_the_same_rows_by_two_names(folder: Path, names: tuple[str, ...], message: str) -> None:
    (folder / "link").symlink_to("twos")
    (folder / "file").mkdir()
    (folder / "file" / "x.parquet").symlink_to(folder / "twos" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message):
        training_source(str(folder), names).load()


def test_a_folder_without_parquet_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no \*.parquet file in"):
        training_source(str(folder), ("default",))
    with pytest.raises(UserError, match=r"test_dataset_path=.*there is no \*.parquet file in"):
        benchmark_source(str(folder))


def test_a_download_that_was_broken_off(folder: Path) -> None:
    (folder / "ones" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"ones has 1 of the 2 files train-\*-of-\*"):
        training_source(str(folder), ("ones",)).load()


def test_other_rows_in_files_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    """The same values in another order: the footers are alike, too."""
    identities = []
    for name, answers in (("a", "AB" * 5), ("b", "BA" * 5)):
        rows = [[{"user": "x", "assistant": answer}] for answer in answers]
        images = [[{"bytes": b"1", "path": None}]] * 10
        file = tmp_path / name / "rows.parquet"
        file.parent.mkdir()
        pq.write_table(pa.table({"images": images, "texts": rows}), file, use_dictionary=False)
        os.utime(file, (1, 1))
        identities.append(training_source(str(file.parent), ("default",)).identity)
    first, second = (identity["files"][0][1][0] for identity in identities)
    assert first[:3] == second[:3]
    assert first != second


def test_a_page_that_does_not_fit_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"number": range(1000)})
    pq.write_table(table, file, write_page_checksum=True, compression="none", use_dictionary=False)
    (group,) = row_groups(file)
    assert list(group.read("number", np.arange(3))) == [0, 1, 2]
    content = bytearray(file.read_bytes())
    place = content.index((500).to_bytes(8, "little"))
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"column number of row group 0 .*CRC.*; download"):
        list(group.read("number", np.arange(3)))


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(UserError, match=r"rows\.parquet is not a parquet file"):
        training_source(str(tmp_path), ("default",)).load()


def test_files_with_other_columns(tmp_path: Path) -> None:
    write_dataset(digits_benchmark_rows().select(range(2)), tmp_path / "rows.parquet")
    with pytest.raises(UserError) as error:
        training_source(str(tmp_path), ("default",)).load()
    assert len(error.value.messages) == 1
    assert "has the columns index, question, image" in str(error.value)
    assert "images must be a list of {bytes, path}, is missing" in str(error.value)
    assert "texts must be a list of {user, assistant}, is missing" in str(error.value)


def test_a_column_of_another_type(tmp_path: Path) -> None:
    table = pa.table({"images": [["a.png"]], "texts": [[{"user": "a", "assistant": "b"}]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"images must be a list of \{bytes, path\}, is list<"):
        training_source(str(tmp_path), ("default",)).load()


def test_digits_have_no_sub_sets() -> None:
    with pytest.raises(UserError, match=r"train_dataset_name=\['ai2d'\].*must be \[default\]"):
        training_source("builtin:digits", ("ai2d",))
