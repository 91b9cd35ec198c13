"""Rows as tensors: splits, labels, what is left out, and what is said about wrong input."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.data import prepared
from nanovlm.data.digits import TRAINING_FEATURES, digits_benchmark_rows
from nanovlm.data.prepared import (
    PreparedBenchmark,
    PreparedSamples,
    prepare_benchmark,
    prepare_training,
)
from nanovlm.data.processors import load_tokenizer
from nanovlm.data.samples import mmstar_prompt
from nanovlm.errors import UserError

CONFIG = TrainConfig(
    batch_size=1,
    val_ratio=0.1,
    data_cutoff_idx=40,
    train_dataset_path="builtin:digits",
    train_dataset_name=("default",),
    test_dataset_path="builtin:digits",
    vlm=VLMConfig(vit_img_size=32, lm_tokenizer="builtin:digits", lm_vocab_size=64),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("builtin:digits")


def rows_of(*rows: tuple[str, list[tuple[str, str]]]) -> datasets.Dataset:
    """Return training rows, each of an image of one colour and (user, assistant) turns."""
    return datasets.Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (4, 4), colour)],
                "texts": [{"user": u, "assistant": a, "source": "test"} for u, a in turns],
            }
            for colour, turns in rows
        ],
        features=TRAINING_FEATURES,
    )


def use_rows(monkeypatch: pytest.MonkeyPatch, rows: datasets.Dataset) -> None:
    monkeypatch.setattr(prepared, "load_training_rows", lambda path, names: rows)


def change(config: TrainConfig, vlm: dict[str, Any] | None = None, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, vlm=dataclasses.replace(config.vlm, **vlm or {}), **values)


def texts(samples: PreparedSamples, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return each sample's prompt as text and its answer as ids."""
    result = []
    for i in range(len(samples)):
        ids = samples.tokens[samples.offsets[i] : samples.offsets[i + 1]].tolist()
        length = int(samples.prompt_lengths[i])
        result.append((tokenizer.decode(ids[:length]), ids[length:]))
    return result


def digest(*parts: PreparedSamples | PreparedBenchmark) -> str:
    """Return a hash of everything that is prepared."""
    content = hashlib.sha256()
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            is_tensor = isinstance(value, torch.Tensor)
            content.update(value.numpy().tobytes() if is_tensor else repr(value).encode())
    return content.hexdigest()


def test_every_turn_of_a_row_is_a_sample(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(
        ("red", [("Which digit", "7"), ("Which range", "A")]), ("blue", [("this?", "B")])
    )
    use_rows(monkeypatch, rows)
    samples, val = prepare_training(change(CONFIG, val_ratio=0.0), tokenizer)
    assert len(val) == 0
    assert sorted(texts(samples, tokenizer)) == sorted(
        (f"Question {user} Answer", [*tokenizer.encode(answer).ids, 0])
        for user, answer in (("Which digit", "7"), ("Which range", "A"), ("this?", "B"))
    )
    for i, (prompt, _) in enumerate(texts(samples, tokenizer)):
        red, _, blue = samples.images[samples.image_index[i], :, 0, 0].tolist()
        assert (red, blue) == ((0, 255) if "this?" in prompt else (255, 0))
    assert samples.num_answer_tokens.tolist() == [2, 2, 2]


def test_over_long_turns_are_dropped_and_counted(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(["digit"] * 30)
    left_out = ("blue", [(long, "C")])
    red, lime = ("red", [(long, "A"), ("this?", "B")]), ("lime", [("this?", "D")])
    use_rows(monkeypatch, rows_of(left_out, red, left_out, lime, left_out))
    samples, _ = prepare_training(change(CONFIG, {"lm_max_length": 8}, val_ratio=0.0), tokenizer)
    assert samples.num_dropped == 4
    assert len(samples.images) == 2
    answers = [tokenizer.decode(answer) for _, answer in texts(samples, tokenizer)]
    colours = samples.images[samples.image_index, :, 0, 0].tolist()
    assert dict(zip(answers, colours, strict=True)) == {"B": [255, 0, 0], "D": [0, 255, 0]}


def test_the_last_rows_are_for_validation(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = "0123456789"
    use_rows(monkeypatch, rows_of(*(("red", [("this?", digit)]) for digit in digits)))

    def answers(**values: Any) -> tuple[str, str]:
        parts = prepare_training(change(CONFIG, **values), tokenizer)
        train, val = (
            "".join(tokenizer.decode(answer) for _, answer in texts(part, tokenizer))
            for part in parts
        )
        return train, val

    everything, _ = answers(val_ratio=0.0)
    assert sorted(everything) == list(digits)
    assert everything != digits
    assert answers(val_ratio=0.2) == (everything[:8], everything[8:])
    assert answers(val_ratio=0.01) == (everything[:9], everything[9:])
    assert answers(val_ratio=0.25, data_cutoff_idx=4) == (everything[:3], everything[3:4])


def test_the_benchmark_keeps_its_order(tokenizer: Tokenizer) -> None:
    benchmark = prepare_benchmark(CONFIG, tokenizer)
    rows = digits_benchmark_rows()
    assert len(benchmark) == len(rows)
    for i in (0, 1, 500, len(rows) - 1):
        prompt = tokenizer.encode(mmstar_prompt(rows[i]["question"])).ids
        assert benchmark.prompt(i).tolist() == prompt
        pixels = torch.from_numpy(np.array(rows[i]["image"]))
        assert torch.equal(benchmark.images[benchmark.image_index[i]], pixels.expand(3, 32, 32))
    assert benchmark.answers == tuple(rows["answer"])
    assert benchmark.categories == tuple(rows["category"])
    assert benchmark.l2_categories == tuple(rows["l2_category"])
    assert benchmark.indices == tuple(range(len(rows)))


def test_another_process_prepares_the_same_bytes(tokenizer: Tokenizer) -> None:
    here = digest(*prepare_training(CONFIG, tokenizer), prepare_benchmark(CONFIG, tokenizer))
    program = (
        "from test_prepared import *\n"
        "tokenizer = load_tokenizer('builtin:digits')\n"
        "parts = *prepare_training(CONFIG, tokenizer), prepare_benchmark(CONFIG, tokenizer)\n"
        "sys.stdout.write(digest(*parts))"
    )
    paths = [str(Path(__file__).parent), str(Path(prepared.__file__).parents[2])]
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout == here


def test_a_batch_larger_than_the_data(tokenizer: Tokenizer) -> None:
    train, val = prepare_training(CONFIG, tokenizer)
    assert len(train) == 9 * len(val) > 0
    prepare_training(change(CONFIG, batch_size=len(train)), tokenizer)
    too_large = len(train) + 1
    with pytest.raises(UserError, match=f"batch_size must .*, got {too_large} and {len(train)}"):
        prepare_training(change(CONFIG, batch_size=too_large), tokenizer)


def test_no_sample_left(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no training sample is left.*lm_max_length=5"):
        prepare_training(change(CONFIG, {"lm_max_length": 5}), tokenizer)
    use_rows(monkeypatch, rows_of(("red", [("this?", "A")])))
    with pytest.raises(UserError, match="of 1 rows 1 are for validation"):
        prepare_training(CONFIG, tokenizer)


def test_a_row_without_image(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"images": [], "texts": [{"user": "this?", "assistant": "A", "source": "test"}]}
    use_rows(monkeypatch, datasets.Dataset.from_list([row], features=TRAINING_FEATURES))
    with pytest.raises(UserError, match="a row has no image"):
        prepare_training(change(CONFIG, val_ratio=0.0), tokenizer)


def test_a_model_with_fewer_tokens_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    prepare_training(change(CONFIG, {"lm_vocab_size": size}), tokenizer)
    for prepare in (prepare_training, prepare_benchmark):
        with pytest.raises(UserError, match=f"lm_vocab_size must .* got {size - 1} and {size}"):
            prepare(change(CONFIG, {"lm_vocab_size": size - 1}), tokenizer)
