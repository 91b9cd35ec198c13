"""A benchmark in MMStar's published columns, made up, and data to learn it from.

1,500 questions about handwritten digits: 250 of each of MMStar's six capabilities, in its 18 axes,
with options inline as MMStar has them and texts of its lengths. The images have its sizes, 114 x 66
to 3160 x 2136, and what images of the web have: JPEG and PNG, colour and grey, palettes, CMYK, an
EXIF orientation, and some with transparent pixels. The tokenizer is a byte-level BPE, and the
answers to learn come in several wordings, so that white space and rules matter.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovlm.data.digits import (
    BENCHMARK_FEATURES,
    END_OF_TEXT,
    INSTRUCTION,
    LETTERS,
    TRAINING_FEATURES,
    load_scans,
)
from tests.hub_data import AXES

NUM_QUESTIONS = 1500
VOCABULARY = 512
QUESTIONS = (
    "Which range does the digit lie in?",
    "Which digit is this?",
    "In which range is the digit?",
    "What digit do you see?",
    "What range holds the digit?",
    "Name the digit in the image.",
)
"""One for each capability: ranges and digits in turns."""

WORDINGS = ("{}", "The answer is ({}).", "**{}**", "Option {}: {option}", "{}. {option}", "({})")
"""Of the answers to learn, one for each capability."""

FORMATS = ("JPEG", "JPEG", "JPEG", "PNG", "grey JPEG", "palette", "CMYK", "turned", "transparent")
LARGEST = (100, 900)
"""Questions whose image has MMStar's largest size."""
FILLER = "The scan was made long ago, and what is written on it was kept by those who came later. "
INSTRUCTIONS = (INSTRUCTION, "Answer with the option's letter from the given choices directly")
"""The last line of the texts to learn: that of the project's prompt, and that of lmms-eval's."""


def write_benchmark(folder: Path, num_questions: int = NUM_QUESTIONS) -> Path:
    """Write the questions as the hub's repository has them; return the parquet file."""
    file = folder / "mmstar.parquet"
    rows = list(_benchmark_rows(num_questions, np.random.default_rng(5)))
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=BENCHMARK_FEATURES).to_parquet(file)
    return file


def write_training_data(folder: Path, turns: int = 6) -> None:
    """Write rows in the_cauldron's columns, of scans that the benchmark does not show."""
    rng = np.random.default_rng(6)
    scans, digits = _scans(in_benchmark=False)
    rows: list[dict[str, object]] = []
    for pixels, digit in zip(scans, digits, strict=True):
        texts = []
        for turn in range(turns):
            place = (len(rows) + turn) % len(WORDINGS)
            question, letter, option = _ask(place, int(digit), rng)
            answer = WORDINGS[place].format(letter, option=option)
            instruction = INSTRUCTIONS[int(rng.integers(2))]
            texts.append(
                {"user": f"{question}\n{instruction}", "assistant": answer, "source": "made up"}
            )
        image = _photo(pixels, (64, 64), "JPEG", rng)
        rows.append({"images": [{"bytes": image, "path": "scan.png"}], "texts": texts})
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=TRAINING_FEATURES).to_parquet(
        folder / "train.parquet"
    )


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of such texts; EOS is 0."""
    rng = np.random.default_rng(7)
    texts = [
        f"Question: {_ask(i % 6, i % 10, rng)[0]}\n{INSTRUCTIONS[i % 2]} Answer:"
        for i in range(2000)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, FILLER, *WORDINGS], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))


def has_transparency(index: int) -> bool:
    """Return whether the image of a question has transparent pixels."""
    return _format_of(index) == "transparent"


def _benchmark_rows(number: int, rng: np.random.Generator) -> Iterator[dict[str, object]]:
    scans, digits = _scans(in_benchmark=True)
    for index in range(number):
        place = index * len(AXES) // number
        category = list(AXES)[place]
        scan = int(rng.integers(len(scans)))
        question, letter, _ = _ask(place, int(digits[scan]), rng)
        if index % 10 == 9:  # the long ones
            question = FILLER * int(rng.integers(1, 1 + 1600 // len(FILLER))) + question
        yield {
            "index": index,
            "question": question,
            "image": {"bytes": _web_image(scans[scan], index, rng), "path": f"{index}.img"},
            "answer": letter,
            "category": category,
            "l2_category": AXES[category][index % 3],
            "meta_info": {"source": "made up", "split": "val", "image_path": f"{index}.img"},
        }


def _scans(in_benchmark: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8[N, 8, 8], 0 is paper and 255 is ink, and the digits int64[N]."""
    ink, digits = load_scans()
    chosen = (np.arange(len(digits)) % 4 == 0) == in_benchmark
    return np.round(ink[chosen] * (255 / 16)).astype(np.uint8), digits[chosen]


def _ask(place: int, digit: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return a question with four options inline, the right letter and its option."""
    if place % 2:
        right, choices = str(digit), [str(d) for d in range(10)]
    else:
        choices = ["0-2", "3-4", "5-6", "7-9"]
        right = choices[(digit > 2) + (digit > 4) + (digit > 6)]
    wrong = [option for option in choices if option != right]
    options = [str(option) for option in rng.choice(wrong, 3, replace=False)]
    options.insert(int(rng.integers(4)), right)
    inline = ", ".join(f"{name}: {option}" for name, option in zip(LETTERS, options, strict=True))
    return f"{QUESTIONS[place]}\nOptions: {inline}", LETTERS[options.index(right)], right


def _format_of(index: int) -> str:
    return FORMATS[index % len(FORMATS)]


def _web_image(scan: np.ndarray, index: int, rng: np.random.Generator) -> bytes:
    width, height = rng.integers((114, 66), (700, 500)).tolist()
    size = (3160, 2136) if index in LARGEST else (width, height)
    return _photo(scan, size, _format_of(index), rng)


def _photo(scan: np.ndarray, size: tuple[int, int], kind: str, rng: np.random.Generator) -> bytes:
    """Return a scan as an image of the web: enlarged, coloured, with noise, encoded."""
    smooth = Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR)
    grey = np.asarray(smooth, np.float32)[..., None] * rng.uniform(0.8, 1.0, 3)
    noise = rng.integers(0, 30, grey.shape)
    return _encoded(Image.fromarray(np.minimum(grey + noise, 255).astype(np.uint8)), kind)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "PNG":
        image.save(file, "PNG", compress_level=1)
    elif kind == "palette":
        image.quantize(64).save(file, "PNG")
    elif kind == "transparent":
        image.putalpha(image.convert("L").point(lambda value: 255 if value > 60 else 0))
        image.save(file, "PNG", compress_level=1)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # turn right
        image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif)
    else:
        modes = {"grey JPEG": "L", "CMYK": "CMYK"}
        image.convert(modes.get(kind, "RGB")).save(file, "JPEG", quality=85)
    return file.getvalue()
