"""Preparing a data set, and reading what is prepared.

    python benchmarks/prepared_data.py                 # 4,000 images; about a minute

It writes rows in the_cauldron's columns, each with a JPEG of 512 x 384 pixels and five turns, to a
temporary folder, and measures
  - images/s of a build from nothing: text, decoding, resizing to 224 pixels, writing to the disk;
  - samples/s read in random batches from files in the page cache, as training reads them;
  - seconds until the first batch is there: in a fresh process with the data prepared, and for the
    second trial of a worker;
  - seconds to find out whether 10 GB of files are those that were prepared.
"""

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.prepared import prepare_training
from nanovlm.data.samples import collate, image_buffer, samples_in_order
from nanovlm.data.tokenizer import load_tokenizer
from nanovlm.files import fingerprint
from nanovlm.resources import Resources

BATCH_SIZE = 256
NUM_BATCHES = 100
NUM_PHOTOS = 200
ROWS_PER_GROUP = 100  # as `datasets` writes rows with images


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # in the processes below
    parser.add_argument("--stage", choices=["build", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        (build if arguments.stage == "build" else read)(config_of(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as name:
        recognize(Path(name))
        write_data(Path(name), arguments.images)
        for stage in ("build", "read"):  # each in a process that has nothing yet
            subprocess.run(
                [sys.executable, __file__, "--stage", stage, "--folder", name],
                env={**os.environ, "HF_ASSETS_CACHE": str(Path(name, "assets"))},
                check=True,
            )


def recognize(folder: Path) -> None:
    """Print how long the fingerprints take. The files are sparse: none of it is the disk's time."""
    files = [folder / str(number) for number in range(20)]
    for file in files:
        with file.open("wb") as stream:
            stream.truncate(500_000_000)
    started = time.perf_counter()
    for file in files:
        fingerprint(file)
    print(f"fingerprints of 20 files, 10 GB in all: {time.perf_counter() - started:.3f} s")
    for file in files:
        file.unlink()


def config_of(folder: Path) -> TrainConfig:
    return TrainConfig(
        train_dataset_path=str(folder / "data"),
        train_dataset_name=("default",),
        vlm=VLMConfig(lm_tokenizer=str(folder)),
    )


def build(config: TrainConfig) -> None:
    """Print how fast the data set is prepared."""
    tokenizer = load_tokenizer(config.vlm.lm_tokenizer)
    started = time.perf_counter()
    train, _ = prepare_training(config, tokenizer)
    seconds = time.perf_counter() - started
    num_images = len(train.images)
    print(f"build: {num_images / seconds:.0f} images/s ({num_images} in {seconds:.1f} s)")


def read(config: TrainConfig) -> None:
    """Print how long the first batches take, and how fast batches are read after them."""
    resources = Resources("cpu")
    for what in ("fresh process, tokenizer included", "second trial of a worker"):
        started = time.perf_counter()
        samples, _ = resources.training_data(config)
        collate(samples, samples_in_order(len(samples), 0, 0, BATCH_SIZE))
        print(f"first batch, {what}: {time.perf_counter() - started:.3f} s")
    rng, buffer = np.random.default_rng(0), image_buffer(samples, BATCH_SIZE)
    speeds = []
    for _ in range(NUM_BATCHES):
        indices = rng.integers(0, len(samples), BATCH_SIZE)
        started = time.perf_counter()
        collate(samples, indices, buffer=buffer)
        speeds.append(BATCH_SIZE / (time.perf_counter() - started))
    warm = statistics.median(speeds[NUM_BATCHES // 2 :])
    print(f"reading: {warm:.0f} samples/s in random batches of {BATCH_SIZE}")


def write_data(folder: Path, num_images: int) -> None:
    """Write parquet files and a tokenizer."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 8))) for _ in range(2000)]

    def sentence(low: int, high: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(low, high)))

    texts = [
        [{"user": sentence(5, 15), "assistant": sentence(1, 10)} for _ in range(5)]
        for _ in range(num_images)
    ]
    rng = np.random.default_rng(0)
    photos = [{"bytes": photo(rng), "path": None} for _ in range(NUM_PHOTOS)]
    images = [[photos[row % NUM_PHOTOS]] for row in range(num_images)]
    (folder / "data").mkdir()
    pq.write_table(
        pa.table({"images": images, "texts": texts}),
        folder / "data" / "rows.parquet",
        row_group_size=ROWS_PER_GROUP,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator((turn["user"] for row in texts for turn in row), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def photo(rng: np.random.Generator) -> bytes:
    """Return a JPEG of 512 x 384 pixels that compresses about as a photo does."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((512, 384))
    fine = np.kron(rng.integers(0, 90, (96, 128, 3)), np.ones((4, 4, 1), np.int64))
    picture = np.asarray(coarse) + fine + rng.integers(0, 12, (384, 512, 3))
    content = io.BytesIO()
    Image.fromarray((picture * 0.7).astype(np.uint8)).save(content, "JPEG", quality=88)
    return content.getvalue()


if __name__ == "__main__":
    main()
