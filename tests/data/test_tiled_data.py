"""Rows as conversations about tiled images: what is written, counted, refused and kept."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data import build, build_images, images
from nanovlm.data.cache import prepared_folders
from nanovlm.data.conversations import tile_of, without_token
from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.data.images import StoredImage, read_image
from nanovlm.data.prepared import describe_data, prepare_benchmark, prepare_training
from nanovlm.data.samples import PreparedSamples, collate
from nanovlm.data.tiles import cut_into_tiles
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.errors import UserError
from tests.data.conftest import change, write_dataset

FolderOf = Callable[..., TrainConfig]
PRESET = build_config(preset_layer("digits-tiles"))
VLM = PRESET.vlm
SIDE = VLM.vit_img_size
TURN = ("Which digit is this?", "7")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return model_tokenizer(VLM)


@pytest.fixture
def tiled(folder_of: FolderOf) -> FolderOf:
    """Return a function that writes rows and returns the config that reads conversations there."""

    def write(vlm: dict[str, Any] | None = None, **subsets: Any) -> TrainConfig:
        config = folder_of(**subsets)
        return change(
            PRESET,
            vlm,
            train_dataset_path=config.train_dataset_path,
            train_dataset_name=config.train_dataset_name,
            batch_size=1,
            val_ratio=0.0,
            max_bad_fraction=0.0,
        )

    return write


def picture(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    """Return the file of a noisy picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


def stored(content: bytes) -> StoredImage:
    return {"bytes": content, "path": None}


def tiles_of(content: bytes) -> np.ndarray:
    image = read_image(stored(content))
    return cut_into_tiles(image, tile_of(VLM)(*image.size), SIDE, VLM.image_resampling)


def described(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    prepare_benchmark(config, tokenizer)
    return describe_data(config, tokenizer)["training"]


def texts(samples: PreparedSamples, tokenizer: Tokenizer) -> list[str]:
    """Return each sample's text, with `@` before each tile and learnt words in brackets."""
    result = []
    assert samples.is_learnt is not None
    for i in range(len(samples)):
        first, end = samples.offsets[i : i + 2].tolist()
        places = samples.slots.places[samples.slots.offsets[i] : samples.slots.offsets[i + 1]]
        words = []
        for place in range(end - first):
            word = tokenizer.id_to_token(int(samples.tokens[first + place]))
            is_learnt = bool(samples.is_learnt[first + place])
            words += ["@"] * int((places == place).sum())
            words.append(f"[{word}]" if is_learnt else str(word))
        result.append(" ".join(words))
    return sorted(result)


SINGLE = "<|global_image|> @"
GRID = f"{SINGLE} <row_1_col_1> @ <row_1_col_2> @ <row_2_col_1> @ <row_2_col_2> @"
ASKED = "Which digit is this? <|im_start|>"


def test_a_row_is_a_conversation_about_all_its_images(
    tokenizer: Tokenizer, tiled: FolderOf
) -> None:
    large, small, wide = picture(40, 30, 1), picture(9, 5, 2), picture(64, 16, 3)
    config = tiled(
        one=[(large, [TURN, ("What remains", "0")]), ([small, wide], [TURN]), ([], [TURN])],
        two=[(None, [("this?", "3")]), ([None, wide], [("this?", "4")])],
    )
    samples, val = prepare_training(config, tokenizer)
    assert len(val) == 0
    assert texts(samples, tokenizer) == sorted(
        [
            f"{GRID} {ASKED} [7] [<|im_end|>] What remains <|im_start|> [0] [<|im_end|>]",
            f"<image 0> {SINGLE} <image 1> {SINGLE} <row_1_col_1> @ <row_1_col_2> @ {ASKED} [7] "
            "[<|im_end|>]",
            f"{ASKED} [7] [<|im_end|>]",
            "this? <|im_start|> [3] [<|im_end|>]",
            f"{SINGLE} <row_1_col_1> @ <row_1_col_2> @ this? <|im_start|> [4] [<|im_end|>]",
        ]
    )
    by_number = {5: [large], 4: [small, wide], 0: [], 3: [wide]}
    for i, number in enumerate(samples.slots.counts.tolist()):
        slots = samples.slots.take(torch.tensor([i]))
        expected = [tiles_of(content) for content in by_number[number]]
        found = samples.images[slots.index].numpy()
        np.testing.assert_array_equal(found, np.concatenate([found[:0], *expected]))
    learnt = [[1, 2][text.count("<|im_start|>") - 1] * 2 for text in texts(samples, tokenizer)]
    assert sorted(samples.num_answer_tokens.tolist()) == sorted(learnt)
    batch = collate(samples, np.arange(len(samples)))
    assert (batch.targets >= 0).sum() == sum(learnt)


def test_counts_of_tiles_and_of_what_is_left_out(tokenizer: Tokenizer, tiled: FolderOf) -> None:
    image, word = "<|image|>", "digit"
    nested = "<|im<|image|>age|>this?"
    rows = [
        (picture(40, 30), [(f"{image}this?{image}", f"{image}7")]),
        (picture(9, 9), [(nested, "7"), ("this?", None)]),
        ([picture(9, 9)] * 5, [TURN]),
        ([picture(9, 9)] * 4, [TURN]),
        (picture(40, 30), [(" ".join([word] * 80), "7"), TURN]),
        (picture(9, 9), [("this?", " ")]),
        (picture(9, 9), []),
        (None, [TURN]),
    ]
    config = tiled(some=rows, more=[(picture(64, 16), [TURN])])
    samples, _ = prepare_training(config, tokenizer)
    assert all("@ this?" in text or "digit" in text for text in texts(samples, tokenizer))
    found = described(config, tokenizer)
    assert (found["images"], found["tiles"], found["median_tiles"]) == (7, 5 + 1 + 4 + 3, 1.0)
    assert found["multi_image_rows"] == 1
    assert found["subsets"]["some"] == {
        "rows": 8,
        "rows_without_turns": 1,
        "rows_without_image": 0,
        "turns": 9,
        "over_long_turns": 2,
        "incomplete_turns": 2,
        "low_rated_turns": 0,
        "rows_with_too_many_images": 1,
        "removed_image_tokens": 5,
        "samples": 4,
    }
    assert len(samples) == 5 == found["samples"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", 0)), ("<|image|>a<|image|>", ("a", 2)), ("<|<|image|>image|>", ("", 2))],
)
def test_no_image_token_comes_from_a_text(text: str, expected: tuple[str, int]) -> None:
    assert without_token(text, "<|image|>") == expected


def test_a_sample_may_be_exactly_as_long_as_the_limit(
    tokenizer: Tokenizer, tiled: FolderOf
) -> None:
    config = tiled(one=[(picture(40, 30), [TURN]), (None, [TURN])])
    length = 5 + 5 * VLM.num_image_tokens + 4 + 3  # markers, tiles, question, answer
    for limit, number in ((length, 2), (length - 1, 1)):
        some = change(config, {"lm_max_length": limit})
        assert len(prepare_training(some, tokenizer)[0]) == number


def test_the_first_turn_alone(tokenizer: Tokenizer, tiled: FolderOf) -> None:
    config = change(tiled(one=[(None, [TURN, ("this?", "3")])]), turns="first")
    samples, _ = prepare_training(config, tokenizer)
    assert texts(samples, tokenizer) == [f"{ASKED} [7] [<|im_end|>]"]


def test_a_sample_without_a_learnt_token_is_incomplete(
    tokenizer: Tokenizer, tiled: FolderOf
) -> None:
    silent = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    config = tiled({"lm_chat_template": silent}, one=[(None, [TURN])])
    with pytest.raises(UserError, match="no training sample is left"):
        prepare_training(config, tokenizer)
    (folder,) = prepared_folders()
    assert folder.manifest()["subsets"]["one"]["incomplete_turns"] == 1


def test_images_that_cannot_be_read_are_bad_rows(tokenizer: Tokenizer, tiled: FolderOf) -> None:
    """Whether that shows in the header or only when they are decoded."""
    whole = picture(40, 30)
    rows = [
        (b"broken", [TURN]),
        ([whole, whole[: len(whole) // 2]], [TURN]),
        (whole, [None]),
        (b"broken", []),
        *[(whole, [TURN])] * 3,
    ]
    config = change(tiled(one=rows), max_bad_fraction=0.5)
    samples, _ = prepare_training(config, tokenizer)
    assert len(samples) == 3
    for number in range(3):
        slots = samples.slots.take(torch.tensor([number]))
        np.testing.assert_array_equal(samples.images[slots.index].numpy(), tiles_of(whole))
    bad = described(config, tokenizer)["bad_rows"]
    assert [(row["row"], row["column"]) for row in bad] == [
        (0, "images"),
        (1, "images"),
        (2, "texts"),
    ]
    assert bad[0]["reason"] == "not an image in a known format"
    assert "truncated" in bad[1]["reason"]
    with pytest.raises(UserError, match="3 of 6 rows cannot be read"):
        prepare_training(change(config, max_bad_fraction=0.4), tokenizer)


def test_turned_and_reduced_images_get_the_tiles_of_their_full_size(
    tokenizer: Tokenizer, tiled: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = picture(64, 32, format="JPEG", exif=exif)  # upright 32 x 64; decoded as 16 x 32
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", len(content) + 64 * 32 * 3)
    assert read_image(stored(content)).size == (16, 32)
    samples, _ = prepare_training(tiled(one=[(content, [TURN])]), tokenizer)
    assert texts(samples, tokenizer) == [
        f"{SINGLE} <row_1_col_1> @ <row_2_col_1> @ {ASKED} [7] [<|im_end|>]"
    ]
    assert samples.images.flatten(1).float().std(dim=1).min() > 0


def test_what_the_data_depends_on(tokenizer: Tokenizer, tiled: FolderOf) -> None:
    config = tiled(one=[(picture(64, 40), [TURN])])
    prepare_training(config, tokenizer)
    ignored = [change(config, max_steps=3), change(config, seed=4)]
    for other in ignored:
        prepare_training(other, tokenizer)
    assert len(prepared_folders()) == 1
    template = str(VLM.lm_chat_template)
    changed: list[dict[str, Any]] = [
        {"max_img_size": 64},
        {"resize_to_max_side_len": True},
        {"lm_max_length": 79},
        {"lm_chat_template": " " + template},
        {"mp_pixel_shuffle_factor": 1},
        {"image_resampling": "bicubic"},
    ]
    for values in changed:
        prepare_training(change(config, values), tokenizer)
    prepare_training(change(config, max_images_per_example=3), tokenizer)
    assert len(prepared_folders()) == 2 + len(changed)


def test_the_benchmark_is_asked_in_one_message(tokenizer: Tokenizer) -> None:
    benchmark = prepare_benchmark(PRESET, tokenizer)
    row = digits_benchmark_rows()[5]
    words = [str(tokenizer.id_to_token(token)) for token in benchmark.prompt(5).tolist()]
    suffix = "Answer with the option's letter from the given choices directly <|im_start|>"
    markers = GRID.replace("@ ", "").removesuffix(" @")
    asked = " ".join(row["question"].replace(",", "").replace(":", "").split())
    assert " ".join(words) == f"{markers} {asked} {suffix}"
    slots = benchmark.slots.take(torch.tensor([5]))
    assert slots.places.tolist() == [1, 2, 3, 4, 5]
    content = io.BytesIO()
    row["image"].save(content, "PNG")
    np.testing.assert_array_equal(
        benchmark.images[slots.index].numpy(), tiles_of(content.getvalue())
    )


@pytest.mark.parametrize("image", [{"bytes": b"broken", "path": None}, None])
def test_a_benchmark_with_a_bad_image_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, image: Any
) -> None:
    rows = digits_benchmark_rows().select(range(3)).to_list()
    rows[1]["image"] = image
    data = digits_benchmark_rows()
    write_dataset(type(data).from_list(rows, data.features), tmp_path / "b" / "b.parquet")
    config = change(PRESET, test_dataset_path=str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be read.*row 1, image: n"):
        prepare_benchmark(config, tokenizer)


def test_the_disk_that_tiles_need_is_known_before_they_are_written(
    tokenizer: Tokenizer, tiled: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 1000}))
    monkeypatch.setattr(build, "write_images", None)
    with pytest.raises(UserError, match=rf"its images take {10 * 3 * SIDE**2 / 1e9:.3g} GB"):
        prepare_training(tiled(one=[([picture(40, 30)] * 2, [TURN])]), tokenizer)


def test_several_processes_and_a_build_that_was_interrupted_write_the_same(
    tokenizer: Tokenizer, tiled: FolderOf, monkeypatch: pytest.MonkeyPatch, own_prepared_data: Path
) -> None:
    sizes = np.random.default_rng(0).integers(1, 70, (60, 2)).tolist()
    pictures = [picture(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    pictures[7] = pictures[7][:60]
    rows = [(pictures[i : i + i % 3], [TURN]) for i in range(60)]
    config = change(tiled(one=rows), max_bad_fraction=0.2)

    def content() -> dict[str, bytes]:
        (folder,) = prepared_folders()
        return {file.name: file.read_bytes() for file in folder.path.iterdir()}

    prepare_training(config, tokenizer)
    whole = content()
    (folder,) = prepared_folders()
    (folder.path / "manifest.json").unlink()
    (folder.path / "images.bin").unlink()
    monkeypatch.setattr(build, "IMAGES_PER_PART", 8)
    monkeypatch.setattr(build, "ROWS_PER_PART", 16)
    done = 0

    def interrupt(progress: Any) -> None:
        nonlocal done
        done += progress.stage == "images"
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_training(config, tokenizer, interrupt)
    assert not folder.is_complete and list(folder.path.glob("parts-*/images-*.json"))
    monkeypatch.setattr("nanovlm.data.text.encode_part", None)  # the text is there already
    monkeypatch.setattr(build_images, "_FEW_IMAGES", 0)
    monkeypatch.setattr(build_images, "usable_cpus", lambda: 2)
    prepare_training(config, tokenizer)
    assert content() == whole
