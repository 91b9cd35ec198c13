"""What is prepared for a configuration, and from what: the recipes of training data and benchmark.

In v0.1 and v0.2 each turn of a row is a sample about the row's first image. In 8k a row is one
sample, a conversation about all its images.
"""

import hashlib
from functools import partial
from typing import Any

import numpy as np
import PIL
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.benchmark import benchmark_items
from nanovlm.data.build import Recipe
from nanovlm.data.build_images import ImageTask, all_in_tiles, first_squashed
from nanovlm.data.cache import IMAGES_FILE, PreparedFolder
from nanovlm.data.chat import ChatEncoder
from nanovlm.data.conversations import (
    encode_chats,
    encode_mmstar_messages,
    read_chat_rows,
    tile_of,
)
from nanovlm.data.rows import Chosen
from nanovlm.data.sources import Source, benchmark_source, training_source
from nanovlm.data.text import (
    EncodeRows,
    ReadRows,
    encode_questions,
    encode_turns,
    read_rated_turns,
)

VERSION = 2
"""Of the bytes that are prepared. A test holds them against a digest: raise this when they change,
so that data which an earlier version has prepared is not taken for this one's."""
TILED_VERSION = 1
"""The same of what is prepared for tiled images alone."""

ROW_ORDER_SEED = 0
"""Rows are shuffled the same way in every run: the cut-off and the validation rows depend on it."""

_TRAINING_IMAGES, _BENCHMARK_IMAGE = "images", "image"


def training_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the training rows of `config` become samples, in the order of the shuffled rows.

    Raises UserError if a sub-set is not there.
    """
    path, vlm = config.train_dataset_path, config.vlm
    source = training_source(
        path, config.train_dataset_name, config.min_ratings, stream=config.stream_dataset
    )
    about = _about("training data", source, config, tokenizer) | {
        "data_cutoff_idx": config.data_cutoff_idx,
        "turns": config.turns,
        "lm_max_length": vlm.max_text_length,
        "lm_eos_token_id": vlm.lm_eos_token_id,
    }
    if config.min_ratings:  # left away else: what was prepared before there were any still counts
        about["min_ratings"] = config.min_ratings
    if vlm.traits.is_tiled:
        about["num_image_tokens"] = vlm.num_image_tokens
        about["max_images_per_example"] = config.max_images_per_example
    folder = PreparedFolder.of(about, path=path)

    def order(num_rows: int) -> np.ndarray:
        shuffled = np.random.default_rng(ROW_ORDER_SEED).permutation(num_rows)
        return shuffled[: config.data_cutoff_idx]

    return Recipe(
        what="training data",
        folder=folder,
        load=source.load,
        order=order,
        text_column="texts",
        read_text=_read_training_rows(config),
        encode=_encode_training_rows(config, tokenizer),
        images=_image_task(_TRAINING_IMAGES, folder, vlm),
        max_bad_fraction=config.max_bad_fraction,
        is_tiled=vlm.traits.is_tiled,
    )


def benchmark_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the benchmark's questions become prompts, in its order.

    Raises UserError if it is not there.
    """
    path, vlm = config.test_dataset_path, config.vlm
    source = benchmark_source(path)
    folder = PreparedFolder.of(_about("benchmark", source, config, tokenizer), path=path)
    read: ReadRows = Chosen.read
    encode: EncodeRows = partial(encode_questions, tokenizer)
    if vlm.traits.is_tiled:
        read = partial(
            read_chat_rows, read_text=read, image_column=_BENCHMARK_IMAGE, tile=tile_of(vlm)
        )
        encode = partial(
            encode_mmstar_messages,
            ChatEncoder.of(vlm, tokenizer),
            tokens=vlm.vlm_extra_tokens,
            image_column=_BENCHMARK_IMAGE,
        )
    return Recipe(
        what="benchmark",
        folder=folder,
        load=source.load,
        order=np.arange,
        text_column="question",
        read_text=read,
        encode=encode,
        images=_image_task(_BENCHMARK_IMAGE, folder, vlm),
        max_bad_fraction=0.0,
        is_tiled=vlm.traits.is_tiled,
        is_whole=True,
        items=partial(benchmark_items, f"test_dataset_path={path!r}"),
    )


def _read_training_rows(config: TrainConfig) -> ReadRows:
    read = partial(read_rated_turns, least=config.min_ratings)
    if not config.vlm.traits.is_tiled:
        return read
    return partial(
        read_chat_rows,
        read_text=read,
        image_column=_TRAINING_IMAGES,
        tile=tile_of(config.vlm),
        max_images=config.max_images_per_example,
    )


def _encode_training_rows(config: TrainConfig, tokenizer: Tokenizer) -> EncodeRows:
    vlm, max_turns = config.vlm, 1 if config.turns == "first" else None
    if not vlm.traits.is_tiled:
        return partial(
            encode_turns,
            tokenizer,
            eos_token_id=vlm.lm_eos_token_id,
            max_length=vlm.max_text_length,
            max_turns=max_turns,
        )
    return partial(
        encode_chats,
        ChatEncoder.of(vlm, tokenizer),
        tokens=vlm.vlm_extra_tokens,
        num_image_tokens=vlm.num_image_tokens,
        max_length=vlm.max_text_length,
        image_column=_TRAINING_IMAGES,
        max_turns=max_turns,
    )


def _about(what: str, source: Source, config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the prepared bytes depend on in training data and benchmark alike."""
    vlm = config.vlm
    about = {
        "what": what,
        "source": source.identity,
        "version": VERSION,
        "pillow": PIL.__version__,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vit_img_size": vlm.vit_img_size,
        "image_resampling": vlm.image_resampling,
    }
    if vlm.traits.is_tiled:
        chat = ChatEncoder.of(vlm, tokenizer)
        about |= {
            "tiled_version": TILED_VERSION,
            "chat_template": chat.template,
            "special_tokens": chat.special_tokens,
            "max_img_size": vlm.max_img_size,
            "resize_to_max_side_len": vlm.resize_to_max_side_len,
        }
    return about


def _image_task(column: str, folder: PreparedFolder, vlm: VLMConfig) -> ImageTask:
    size, resampling = vlm.vit_img_size, vlm.image_resampling
    if vlm.traits.is_tiled:
        prepare = partial(all_in_tiles, tile=tile_of(vlm), size=size, resampling=resampling)
    else:
        prepare = partial(first_squashed, size=size, resampling=resampling)
    return ImageTask(column, size, prepare, folder.path / IMAGES_FILE)
