"""Rows as tensors: splits, labels, what is left out, and what is said about wrong input."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.data import recipes
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.cache import PreparedFolder
from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.data.prepared import (
    describe_data,
    prepare_benchmark,
    prepare_training,
)
from nanovlm.data.samples import PreparedSamples
from nanovlm.data.text import mmstar_prompt
from nanovlm.errors import UserError
from nanovlm.watch.terminal.tables import count_left_out
from tests.data.conftest import CONFIG, change, write_dataset

FolderOf = Callable[..., TrainConfig]
FILE = "train-00000-of-00001.parquet"
"""What `folder_of` writes for each sub-set."""


def texts(samples: PreparedSamples, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return each sample's prompt as text and its answer as ids."""
    result = []
    for i in range(len(samples)):
        ids = samples.tokens[samples.offsets[i] : samples.offsets[i + 1]].tolist()
        length = int(samples.prompt_lengths[i])
        result.append((tokenizer.decode(ids[:length]), ids[length:]))
    return result


def images_of(samples: PreparedSamples | PreparedBenchmark) -> torch.Tensor:
    """Return the number of each sample's only image."""
    return samples.slots.take(torch.arange(len(samples))).index


def answers(samples: PreparedSamples, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.decode(answer) for _, answer in texts(samples, tokenizer))


def digest(*parts: PreparedSamples | PreparedBenchmark) -> str:
    """Return a hash of everything that is prepared."""
    content = hashlib.sha256()
    for part in parts:
        for field in dataclasses.fields(part):
            value = images_of(part) if field.name == "slots" else getattr(part, field.name)
            if value is None:  # nothing is on the disk for it
                continue
            is_tensor = isinstance(value, torch.Tensor)
            content.update(value.numpy().tobytes() if is_tensor else repr(value).encode())
    return content.hexdigest()


def test_every_turn_of_a_row_is_a_sample(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    config = folder_of(
        one=[("red", [("Which digit", "7"), ("Which range", "A")])],
        two=[("blue", [("this?", "B")])],
    )
    samples, val = prepare_training(config, tokenizer)
    assert len(val) == 0
    assert sorted(texts(samples, tokenizer)) == sorted(
        (f"Question {user} Answer", [*tokenizer.encode(answer).ids, 0])
        for user, answer in (("Which digit", "7"), ("Which range", "A"), ("this?", "B"))
    )
    for i, (prompt, _) in enumerate(texts(samples, tokenizer)):
        red, _, blue = samples.images[images_of(samples)[i], :, 0, 0].tolist()
        assert (red, blue) == ((0, 255) if "this?" in prompt else (255, 0))
    assert samples.num_answer_tokens.tolist() == [2, 2, 2]


def test_the_first_turn_alone(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    turns = [("this?", "1"), ("this?", "2"), ("this?", "3")]
    config = folder_of(one=[("red", turns)])
    assert answers(prepare_training(config, tokenizer)[0], tokenizer) == "123"
    assert answers(prepare_training(change(config, turns="first"), tokenizer)[0], tokenizer) == "1"


def test_turns_that_cannot_be_used_are_dropped_and_counted(
    tokenizer: Tokenizer, folder_of: FolderOf
) -> None:
    long = " ".join(["digit"] * 30)
    left_out = ("blue", [(long, "C")])
    nothing = [("this?", None), (None, "7"), ("this?", ""), ("this?", "Answer: ")]
    red = ("red", [(long, "A"), ("this?", "B"), *nothing])
    lime = ("lime", [("this?", "D")])
    config = folder_of(
        some=[left_out, red, left_out, lime],
        none=[left_out, ("red", []), ("red", None)],
        all=[lime, lime, lime],
    )
    config = change(config, {"lm_max_length": 8})
    samples, _ = prepare_training(config, tokenizer)
    assert len(samples.images) == 5  # the others are never decoded
    colours = samples.images[images_of(samples), :, 0, 0].tolist()
    assert sorted(zip(answers(samples, tokenizer), colours, strict=True)) == [
        ("B", [255, 0, 0]),
        *[("D", [0, 255, 0])] * 4,
    ]
    prepare_benchmark(config, tokenizer)
    assert describe_data(config, tokenizer)["training"]["subsets"] == {
        "some": {
            "rows": 4,
            "rows_without_turns": 0,
            "rows_without_image": 0,
            "turns": 9,
            "over_long_turns": 3,
            "incomplete_turns": 4,
            "low_rated_turns": 0,
            "samples": 2,
        },
        "none": {
            "rows": 3,
            "rows_without_turns": 2,
            "rows_without_image": 0,
            "turns": 1,
            "over_long_turns": 1,
            "incomplete_turns": 0,
            "low_rated_turns": 0,
            "samples": 0,
        },
        "all": {
            "rows": 3,
            "rows_without_turns": 0,
            "rows_without_image": 0,
            "turns": 3,
            "over_long_turns": 0,
            "incomplete_turns": 0,
            "low_rated_turns": 0,
            "samples": 3,
        },
    }


def rate(config: TrainConfig, **ratings: list[list[int | None] | None]) -> None:
    """Add columns of ratings to the only file of `config`."""
    (file,) = Path(config.train_dataset_path).rglob("*.parquet")
    rows = pq.read_table(file)
    for kind, values in ratings.items():
        rows = rows.append_column(f"{kind}_ratings", pa.array(values, pa.list_(pa.int64())))
    pq.write_table(rows, file, row_group_size=2)


def test_turns_that_are_rated_too_low_are_left_out_and_counted(
    tokenizer: Tokenizer, folder_of: FolderOf
) -> None:
    turns = [("this?", digit) for digit in "1234"]
    config = folder_of(rated=[("red", turns), ("lime", [("this?", "5")]), ("blue", turns[:1])])
    rate(
        config,
        relevance=[[1, 2, 3, None], None, [5]],
        formatting=[[5, 5, 1, 5], [5], [1]],
    )
    whole, _ = prepare_training(config, tokenizer)
    some, _ = prepare_training(change(config, relevance_min_rating=2), tokenizer)
    config = change(config, relevance_min_rating=2, formatting_min_rating=5)
    few, _ = prepare_training(config, tokenizer)
    found = ["".join(sorted(answers(samples, tokenizer))) for samples in (whole, some, few)]
    assert found == ["112345", "12345", "245"]
    prepare_benchmark(config, tokenizer)
    (counts,) = describe_data(config, tokenizer)["training"]["subsets"].values()
    assert (counts["turns"], counts["low_rated_turns"], counts["incomplete_turns"]) == (6, 3, 0)
    assert count_left_out({"subsets": {"rated": counts}}) == {"turns rated too low": 3}


def test_ratings_that_do_not_fit(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    config = folder_of(rated=[("red", [("this?", "1")]), ("lime", [("this?", "2")])])
    config = change(config, relevance_min_rating=2)
    with pytest.raises(
        UserError, match=r"relevance_ratings must be a list of integers, is missing"
    ):
        prepare_training(config, tokenizer)
    rate(config, relevance=[[2, 3], [2]])
    with pytest.raises(
        UserError, match=r"row 0, texts: relevance_ratings has 2 values for 1 turns"
    ):
        prepare_training(config, tokenizer)
    samples, _ = prepare_training(change(config, max_bad_fraction=0.5), tokenizer)
    assert answers(samples, tokenizer) == "2"
    digits = change(CONFIG, visual_dependency_min_rating=3)
    with pytest.raises(
        UserError, match="visual_dependency_min_rating=3: builtin:digits has no rat"
    ):
        prepare_training(digits, tokenizer)


def test_rows_with_several_images_use_the_first(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    config = folder_of(one=[(["red", "blue"], [("this?", "1")]), ("lime", [("this?", "2")])])
    samples, _ = prepare_training(config, tokenizer)
    colours = samples.images[images_of(samples), :, 0, 0].tolist()
    by_answer = dict(zip(answers(samples, tokenizer), colours, strict=True))
    assert by_answer == {"1": [255, 0, 0], "2": [0, 255, 0]}
    prepare_benchmark(config, tokenizer)
    assert describe_data(config, tokenizer)["training"]["multi_image_rows"] == 1


def test_rows_that_cannot_be_read_are_left_out_and_listed(
    tokenizer: Tokenizer, folder_of: FolderOf
) -> None:
    turns = [("this?", "1"), ("this?", "2")]
    good = [("red", turns)] * 5
    gone, not_there = {"bytes": None, "path": "/fsx/m4/1.png"}, "not there: /fsx/m4/1.png"
    config = folder_of(
        good=good,
        mixed=[(b"broken", turns), ("blue", [None]), *good, ("blue", [*turns, None])],
        gone=[(gone, turns), ("blue", [("this?", b"1\xff")])],
    )
    config = change(config, max_bad_fraction=1 / 3)
    samples, _ = prepare_training(config, tokenizer)
    assert answers(samples, tokenizer) == "12" * 10
    assert (samples.images[images_of(samples), 0, 0, 0] == 255).all()
    prepare_benchmark(config, tokenizer)
    described = describe_data(config, tokenizer)["training"]
    assert [tuple(row.values()) for row in described["bad_rows"]] == [
        ("mixed", "mixed/" + FILE, 0, "images", "not an image in a known format"),
        ("mixed", "mixed/" + FILE, 1, "texts", "turn 0 is null"),
        ("mixed", "mixed/" + FILE, 7, "texts", "turn 2 is null"),
        ("gone", "gone/" + FILE, 0, "images", f"holds the path of a file that is {not_there}"),
        (
            "gone",
            "gone/" + FILE,
            1,
            "texts",
            "text that is not UTF-8: invalid start byte at byte 1",
        ),
    ]
    assert list(described["bad_rows"][0]) == ["subset", "file", "row", "column", "reason"]
    assert (described["samples"], described["usable_rows"]) == (20, 15)
    assert json.dumps(described)
    with pytest.raises(UserError) as error:  # also of what is prepared already
        prepare_training(change(config, max_bad_fraction=0.3), tokenizer)
    assert "5 of 15 rows cannot be read (gone: 2, mixed: 3), more than max" in str(error.value)
    assert f"=0.3 allows: mixed/{FILE} row 0, images: not an image" in str(error.value)
    assert f"mixed/{FILE} row 7, texts: turn 2 is null and 2 more" in str(error.value)


def test_too_much_text_that_cannot_be_read_ends_it_before_the_images(
    tokenizer: Tokenizer, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder_of(one=[("red", [("this?", "1")]), ("blue", [None])])
    monkeypatch.setattr("nanovlm.data.build.write_images", None)
    with pytest.raises(UserError, match="1 of 2 rows cannot be read"):
        prepare_training(change(config, max_bad_fraction=0.4), tokenizer)


def test_rows_without_an_image_are_no_bad_ones(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    turns, nothing = [("this?", "1")], {"bytes": None, "path": None}
    without = [(None, turns), ([], turns), ([None], turns), ([nothing], turns)]
    config = folder_of(some=[*without, ([None, "red"], turns)], none=without)
    samples, _ = prepare_training(change(config, max_bad_fraction=0.0), tokenizer)
    assert len(samples) == 1
    assert samples.images[images_of(samples)[0], :, 0, 0].tolist() == [255, 0, 0]
    prepare_benchmark(config, tokenizer)
    described = describe_data(config, tokenizer)["training"]
    assert described["bad_rows"] == []
    assert described["multi_image_rows"] == 0
    assert [s["rows_without_image"] for s in described["subsets"].values()] == [4, 4]
    bad = change(folder_of(some=[*without, (b"broken", turns), ("red", turns)]))
    with pytest.raises(UserError, match="1 of 2 rows cannot be read"):  # not of 6
        prepare_training(change(bad, max_bad_fraction=0.4), tokenizer)


def test_the_last_rows_are_for_validation(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    digits = "0123456789"
    config = folder_of(one=[("red", [("this?", digit)]) for digit in digits])

    def parts(**values: Any) -> tuple[str, str]:
        train, val = prepare_training(change(config, **values), tokenizer)
        return answers(train, tokenizer), answers(val, tokenizer)

    everything, _ = parts()
    assert sorted(everything) == list(digits)
    assert everything != digits
    assert parts(val_ratio=0.2) == (everything[:8], everything[8:])
    assert parts(val_ratio=0.01) == (everything[:9], everything[9:])
    assert parts(val_ratio=0.25, data_cutoff_idx=4) == (everything[:3], everything[3:4])


def test_the_benchmark_keeps_its_order(tokenizer: Tokenizer) -> None:
    benchmark = prepare_benchmark(CONFIG, tokenizer)
    rows = digits_benchmark_rows()
    assert len(benchmark) == len(rows)
    for i in (0, 1, 500, len(rows) - 1):
        prompt = tokenizer.encode(mmstar_prompt(rows[i]["question"])).ids
        assert benchmark.prompt(i).tolist() == prompt
        pixels = torch.from_numpy(np.array(rows[i]["image"]))
        assert torch.equal(benchmark.images[benchmark.slots.index[i]], pixels.expand(3, 32, 32))
    assert benchmark.answers == tuple(rows["answer"])
    assert benchmark.categories == tuple(rows["category"])
    assert benchmark.l2_categories == tuple(rows["l2_category"])
    assert benchmark.indices == tuple(range(len(rows)))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"bytes": b"broken", "path": None}, r"b\.parquet row 1, image: not an image"),
        (None, r"b\.parquet row 1, image: no image"),
    ],
)
def test_a_benchmark_with_an_unreadable_image_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, image: Any, said: str
) -> None:
    rows = digits_benchmark_rows().select(range(3)).to_list()
    rows[1]["image"] = image
    features = digits_benchmark_rows().features
    write_dataset(
        type(digits_benchmark_rows()).from_list(rows, features), tmp_path / "b" / "b.parquet"
    )
    config = change(CONFIG, test_dataset_path=str(tmp_path / "b"), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"benchmark: at least 1 of 3 rows cannot be read.*" + said):
        prepare_benchmark(config, tokenizer)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("question", ["a", None, "c"], r"b/b\.parquet row 1: question is null"),
        ("question", ["a", "b", " \n"], r"b/b\.parquet row 2: question is empty"),
        ("answer", [None, "A", "A"], r"b/b\.parquet row 0: answer is null"),
        ("category", ["a", None, "c"], r"b/b\.parquet row 1: category is null"),
        ("category", ["a", "", "c"], r"b/b\.parquet row 1: category is empty"),
        (
            "l2_category",
            [None, None, "c"],
            r"row 0: l2_category is null\n.*row 1: l2_category is null",
        ),
        ("l2_category", [None] * 3, r"row 2: l2_category is null"),
        ("index", [4, None, 5], r"b/b\.parquet row 1: index is null"),
        ("index", [4, 7, 4], "the column index must tell all questions apart; 4 stand more than"),
        ("category", ["a", "a/recognition", "a"], "differently; 'a/recognition' stand for several"),
    ],
)
def test_a_benchmark_with_a_bad_column_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    rows = digits_benchmark_rows().select(range(3))
    rows = rows.remove_columns(column).add_column(column, values)
    write_dataset(rows, tmp_path / "b" / "b.parquet")
    with pytest.raises(UserError, match=message):
        prepare_benchmark(change(CONFIG, test_dataset_path=str(tmp_path / "b")), tokenizer)
    assert not [*tmp_path.glob("prepared/*/images.bin")]  # said before anything is made


def test_the_bytes_are_those_of_this_version(tokenizer: Tokenizer) -> None:
    vlm = {"vit_img_size": 64, "image_resampling": "bicubic"}
    config = change(CONFIG, vlm, data_cutoff_idx=40, val_ratio=0.1)
    found = digest(*prepare_training(config, tokenizer), prepare_benchmark(config, tokenizer))
    # When this fails, what earlier versions have prepared is not what this one would prepare:
    # raise recipes.VERSION and set both to what they are now.
    assert (recipes.VERSION, found[:16]) == (2, "61242e3b7fe88a3b")


def test_what_is_prepared_is_used_again(
    tokenizer: Tokenizer, own_prepared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(*prepare_training(CONFIG, tokenizer), prepare_benchmark(CONFIG, tokenizer))
    folders = {path.name for path in own_prepared_data.iterdir() if path.is_dir()}
    assert len(folders) == 2
    monkeypatch.setattr("nanovlm.data.text.encode_part", None)  # nothing is encoded again
    again = change(CONFIG, batch_size=2, val_ratio=0.5, lr_mp=0.5, max_bad_fraction=0.5)
    prepare_training(again, tokenizer)
    assert (
        digest(*prepare_training(CONFIG, tokenizer), prepare_benchmark(CONFIG, tokenizer)) == first
    )
    assert {path.name for path in own_prepared_data.iterdir() if path.is_dir()} == folders


@pytest.mark.parametrize(
    "values",
    [
        {"data_cutoff_idx": 5},
        {"turns": "first"},
        {"vlm": {"lm_max_length": 20}},
        {"vlm": {"lm_eos_token_id": 1}},
        {"vlm": {"vit_img_size": 64}},
        {"vlm": {"image_resampling": "bilinear"}},
    ],
)
def test_what_changes_the_bytes_is_prepared_apart(
    tokenizer: Tokenizer, folder_of: FolderOf, own_prepared_data: Path, values: dict[str, Any]
) -> None:
    config = change(folder_of(one=[("red", [("this?", "1")])]), {"image_resampling": "bicubic"})
    prepare_training(config, tokenizer)
    prepare_training(change(config, **values), tokenizer)
    assert len(list(own_prepared_data.glob("*/manifest.json"))) == 2


def test_changed_files_are_prepared_anew(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    config = folder_of(one=[("red", [("this?", "1")])])
    assert answers(prepare_training(config, tokenizer)[0], tokenizer) == "1"
    folder_of(one=[("red", [("this?", "2")])])
    assert answers(prepare_training(config, tokenizer)[0], tokenizer) == "2"


def test_a_file_of_another_size_is_noticed(
    tokenizer: Tokenizer, folder_of: FolderOf, own_prepared_data: Path
) -> None:
    config = folder_of(one=[("red", [("this?", "1")])])
    prepare_training(config, tokenizer)
    (images,) = own_prepared_data.glob("*/images.bin")
    images.write_bytes(images.read_bytes()[:-1])
    key = images.parent.name
    with pytest.raises(UserError, match=f"must have 3072 bytes, has 3071.*delete {key}`"):
        prepare_training(config, tokenizer)


def test_images_may_be_larger_than_the_memory(own_prepared_data: Path) -> None:
    image_bytes = 3 * 224 * 224
    number = 2 * psutil.virtual_memory().total // image_bytes
    folder = PreparedFolder(own_prepared_data, {})
    with (own_prepared_data / "images.bin").open("wb") as file:
        file.truncate(number * image_bytes)  # sparse: it takes no disk
    images = folder.mapped("images.bin", (number, 3, 224, 224))
    assert len(images) == number
    assert not images[-1].any()


def test_a_batch_larger_than_the_data(tokenizer: Tokenizer) -> None:
    config = change(CONFIG, data_cutoff_idx=40, val_ratio=0.1)
    train, val = prepare_training(config, tokenizer)
    assert len(train) == 9 * len(val) > 0
    prepare_training(change(config, batch_size=len(train)), tokenizer)
    too_large = len(train) + 1
    with pytest.raises(UserError, match=f"batch_size must .*, got {too_large} and {len(train)}"):
        prepare_training(change(config, batch_size=too_large), tokenizer)


def test_no_sample_is_left(tokenizer: Tokenizer, folder_of: FolderOf) -> None:
    config = folder_of(one=[("red", [("this?", "1")])])
    with pytest.raises(UserError, match=r"no training sample is left; of 1 rows 0 .*and 1 turns"):
        prepare_training(change(config, {"lm_max_length": 2}), tokenizer)
    with pytest.raises(UserError, match=r"no training sample is left; of 1 rows 1 are for val"):
        prepare_training(change(config, val_ratio=0.5), tokenizer)


def test_a_full_disk_is_noticed_before_images_are_written(
    tokenizer: Tokenizer, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder_of(one=[("red", [("this?", "1")])] * 2 + [("blue", [("this?", "2")])] * 2)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 3072 - 1))
    with pytest.raises(
        UserError, match=r"take 1\.23e-05 GB in .* 1\.23e-05 GB are free; HF_ASSETS"
    ):
        prepare_training(config, tokenizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 3072))
    prepare_training(config, tokenizer)


def test_a_model_with_fewer_tokens_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    prepare_training(change(CONFIG, {"lm_vocab_size": size}), tokenizer)
    for prepare in (prepare_training, prepare_benchmark):
        with pytest.raises(UserError, match=f"got {size - 1} and ids up to {size - 1}"):
            prepare(change(CONFIG, {"lm_vocab_size": size - 1}), tokenizer)
