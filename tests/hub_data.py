"""Data sets and a tokenizer in the hub's own formats, small enough for tests.

Every picture shows one coloured shape, and every question can be answered from it, so what a
model learns on the rows of `write_cauldron` helps it with those of `write_mmstar`.
"""

import dataclasses
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import BENCHMARK_FEATURES, TRAINING_FEATURES
from nanovlm.data.text import mmstar_prompt, training_prompt
from tests.hub_files import make_llama, make_two_towers

CAULDRON_NAMES = ("ai2d", "tqa", "vsr")
COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 210),
    "yellow": (230, 210, 40),
}
SHAPES = ("circle", "square", "triangle", "bar")
LETTERS = "ABCD"
AXES = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}
"""MMStar's capabilities and their axes."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first three of cosmo2-tokenizer, with the ids 0, 1 and 2."""

VLM = VLMConfig(
    vit_hidden_dim=32,
    vit_patch_size=16,
    vit_img_size=64,
    vit_n_heads=2,
    vit_n_blocks=1,
    lm_hidden_dim=32,
    lm_inter_dim=64,
    lm_vocab_size=512,
    lm_n_heads=4,
    lm_n_kv_heads=2,
    lm_n_blocks=2,
    lm_max_length=64,
    lm_max_position_embeddings=512,
)
"""As nanoVLM-222M, a thousandth of its size: pretrained backbones, tied head, grouped queries."""


@dataclass(frozen=True)
class Picture:
    """A coloured shape on a grey ground, and its file."""

    colour: str
    shape: str
    size: tuple[int, int]
    """Width and height in pixels."""
    file_format: str

    def encoded(self) -> bytes:
        image = Image.new("RGB", self.size, (128, 128, 128))
        width, height = self.size
        side = min(self.size) // 2
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        draw, fill = ImageDraw.Draw(image), COLOURS[self.colour]
        if self.shape == "circle":
            draw.ellipse(box, fill)
        elif self.shape == "square":
            draw.rectangle(box, fill)
        elif self.shape == "triangle":
            draw.polygon([(left, box[3]), (box[2], box[3]), (width // 2, top)], fill)
        else:
            draw.rectangle((left, height // 2 - side // 8, box[2], height // 2 + side // 8), fill)
        file = io.BytesIO()
        image.save(file, self.file_format)
        return file.getvalue()


def pictures(seed: int) -> Iterator[Picture]:
    """Yield pictures without end: every pair of colour and shape in turn, sizes near 512 x 384."""
    draw = random.Random(seed)
    for colour, shape in itertools.cycle(itertools.product(COLOURS, SHAPES)):
        size = (draw.randrange(448, 577), draw.randrange(320, 449))
        yield Picture(colour, shape, size, draw.choice(("JPEG", "PNG")))


def _options(answer: str, known: tuple[str, ...], draw: random.Random) -> tuple[list[str], str]:
    """Return the known words in some order, and the letter of `answer` among them."""
    options = draw.sample(known, len(known))
    return options, LETTERS[options.index(answer)]


def _choice_turn(picture: Picture, draw: random.Random) -> tuple[str, str]:
    """As ai2d and tqa ask; their answers are `Answer: B` and not the letter alone."""
    asked, answer, known = draw.choice(
        (("colour", picture.colour, tuple(COLOURS)), ("shape", picture.shape, SHAPES))
    )
    options, letter = _options(answer, known, draw)
    choices = "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, options, strict=True))
    question = f"Question: Which {asked} is shown?\nChoices:\n{choices}\nAnswer with the letter."
    return question, f"Answer: {letter}"


def _caption_turn(picture: Picture, draw: random.Random) -> tuple[str, str]:
    """As vsr asks."""
    colour = draw.choice(tuple(COLOURS))
    question = f'Is the caption "The {picture.shape} is {colour}." true?\nAnswer yes or no.'
    return question, "Yes." if colour == picture.colour else "No."


def _long_turn(picture: Picture, draw: random.Random) -> tuple[str, str]:
    """One that no lm_max_length of these tests lets through."""
    sentence = f"In the middle there is a {picture.shape}, and its colour is {picture.colour}."
    return "Describe the picture at length.", " ".join([sentence] * 12)


Turn = Callable[[Picture, random.Random], tuple[str, str]]
TURNS: dict[str, tuple[Turn, ...]] = {
    "ai2d": (_choice_turn, _choice_turn, _choice_turn),
    "tqa": (_choice_turn, _long_turn, _choice_turn),
    "vsr": (_caption_turn, _caption_turn),
}


def write_cauldron(folder: Path, num_rows: int = 48) -> Path:
    """Write the sub-sets `CAULDRON_NAMES` as the_cauldron has them, in two shards each."""
    for seed, name in enumerate(CAULDRON_NAMES):
        draw = random.Random(seed)
        rows = []
        for picture in itertools.islice(pictures(seed), num_rows):
            turns = [turn(picture, draw) for turn in TURNS[name]]
            rows.append(
                {
                    "images": [{"bytes": picture.encoded(), "path": None}],
                    "texts": [{"user": u, "assistant": a, "source": name} for u, a in turns],
                }
            )
        (folder / name).mkdir(parents=True)
        data = datasets.Dataset.from_list(rows, features=TRAINING_FEATURES)
        for shard in range(2):
            file = f"train-{shard:05}-of-00002-{seed:016x}.parquet"
            data.shard(2, shard, contiguous=True).to_parquet(folder / name / file)
    return folder


def write_mmstar(folder: Path, num_per_axis: int = 4) -> Path:
    """Write a benchmark as MMStar has it: one file, its columns, six capabilities, 18 axes."""
    draw, rows = random.Random(7), list[dict[str, Any]]()
    axes = [(category, axis) for category in AXES for axis in AXES[category]]
    items = zip(pictures(seed=7), axes * num_per_axis, strict=False)
    for index, (picture, (category, axis)) in enumerate(items):
        options, letter = _options(picture.colour, tuple(COLOURS), draw)
        listed = ", ".join(f"{a}: {b}" for a, b in zip(LETTERS, options, strict=True))
        rows.append(
            {
                "index": index,
                "question": f"Which colour is shown?\nOptions: {listed}",
                "image": {"bytes": picture.encoded(), "path": None},
                "answer": letter,
                "category": category,
                "l2_category": axis,
                "meta_info": {
                    "source": "MMBench",
                    "split": "val",
                    "image_path": f"images/{index}.jpg",
                },
            }
        )
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows, features=BENCHMARK_FEATURES)
    data.to_parquet(folder / "mmstar.parquet")
    return folder


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> Path:
    """Write a byte-level BPE tokenizer trained on `texts`, of cosmo2-tokenizer's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = SPECIAL_TOKENS[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    fast.save_pretrained(folder)
    return folder


def training_texts(cauldron: Path, mmstar: Path) -> list[str]:
    """Return the texts of both, as a model reads them."""
    texts = []
    for file in sorted(cauldron.glob("*/*.parquet")):
        for turns in datasets.Dataset.from_parquet(str(file))["texts"]:
            texts += [f"{training_prompt(t['user'])}{t['assistant']}" for t in turns]
    questions = datasets.Dataset.from_parquet(str(mmstar / "mmstar.parquet"))["question"]
    return texts + [mmstar_prompt(question) for question in questions]


def write_hub(folder: Path) -> Path:
    """Write everything that a search on the hub's files needs; return its preset, a YAML file."""
    cauldron = write_cauldron(folder / "the_cauldron")
    mmstar = write_mmstar(folder / "MMStar")
    texts = training_texts(cauldron, mmstar)
    tokenizer = write_tokenizer(folder / "cosmo2-tokenizer", texts, VLM.lm_vocab_size)
    vlm = dataclasses.replace(
        VLM,
        vit_model_type=str(folder / "siglip-base-patch16-64"),
        lm_model_type=str(folder / "SmolLM2"),
        lm_tokenizer=str(tokenizer),
    )
    make_two_towers(vlm)
    make_llama(vlm)
    preset = {
        "train_dataset_path": str(cauldron),
        "train_dataset_name": list(CAULDRON_NAMES),
        "test_dataset_path": str(mmstar),
        "val_ratio": 0.1,
        "compile": False,
        "log_wandb": False,
        "vlm": {k: v for k, v in dataclasses.asdict(vlm).items() if v != getattr(VLMConfig(), k)},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path
