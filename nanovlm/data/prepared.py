"""Training data and benchmark as tensors over files: decoded and encoded once for all who use them.

What is prepared lies on the disk (`nanovlm.data.cache`) and is mapped into memory: trials, workers
and later searches share one copy in the page cache.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import PIL
import torch
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.benchmark import PreparedBenchmark, benchmark_items
from nanovlm.data.build import OnProgress, Recipe, build, log_progress
from nanovlm.data.build_images import ImageTask
from nanovlm.data.cache import IMAGES_FILE, PreparedFolder
from nanovlm.data.samples import ImageSlots, PreparedSamples
from nanovlm.data.sources import Source, benchmark_source, training_source
from nanovlm.data.text import encode_questions, encode_turns, read_rated_turns
from nanovlm.data.tokenizer import check_tokens
from nanovlm.errors import UserError

VERSION = 2
"""Of the bytes that are prepared. A test holds them against a digest: raise this when they change,
so that data which an earlier version has prepared is not taken for this one's."""

ROW_ORDER_SEED = 0
"""Rows are shuffled the same way in every run: the cut-off and the validation rows depend on it."""


def prepare_training(
    config: TrainConfig, tokenizer: Tokenizer, on_progress: OnProgress = log_progress
) -> tuple[PreparedSamples, PreparedSamples]:
    """Return the samples for training and for validation, prepared now if they were not before.

    The rows of all sub-sets are shuffled, the first `data_cutoff_idx` kept, and the last
    `val_ratio` of these (at least one, unless it is 0) are for validation. Every turn of a row is
    a sample, or its first one alone (`turns`); it sees the row's first image.

    Raises:
        UserError: data or tokenizer do not fit the configuration, or too few samples are left.
    """
    check_tokens(config.vlm, tokenizer)
    recipe = _training_recipe(config, tokenizer)
    manifest = build(recipe, on_progress)
    bad, num_rows = manifest["bad_rows"], manifest["rows"]
    recipe.check_bad_rows(len(bad), manifest["usable_rows"], lambda: bad)
    num_val = max(1, round(num_rows * config.val_ratio)) if config.val_ratio else 0
    positions = recipe.folder.array("places")
    num_train = int(np.searchsorted(positions, num_rows - num_val))
    everything = PreparedSamples(**_fields(recipe, manifest))
    train, val = _part(everything, 0, num_train), _part(everything, num_train, len(positions))
    if not len(train):
        over_long = sum(subset["over_long_turns"] for subset in manifest["subsets"].values())
        with_image = ", image included" if config.vlm.traits.length_includes_image else ""
        raise UserError(
            f"train_dataset_path={config.train_dataset_path!r}: no training sample is left; of "
            f"{num_rows} rows {num_val} are for validation (val_ratio={config.val_ratio}), "
            f"and {over_long} turns exceed vlm.lm_max_length={config.vlm.lm_max_length} tokens"
            f"{with_image}"
        )
    check_batch_size(config.batch_size, train)
    return train, val


def prepare_benchmark(
    config: TrainConfig, tokenizer: Tokenizer, on_progress: OnProgress = log_progress
) -> PreparedBenchmark:
    """Return the benchmark's questions as prompts, in its order; prepared now if need be.

    Raises:
        UserError: data or tokenizer do not fit the configuration, or an image cannot be read: a
            score over fewer questions would be another benchmark's.
    """
    check_tokens(config.vlm, tokenizer)
    recipe = _benchmark_recipe(config, tokenizer)
    manifest = build(recipe, on_progress)
    items, fields = manifest["items"], _fields(recipe, manifest)
    del fields["prompt_lengths"]  # a prompt is all that there is
    return PreparedBenchmark(
        **fields,
        answers=tuple(items["answer"]),
        categories=tuple(items["category"]),
        l2_categories=tuple(items["l2_category"]),
        indices=tuple(items["index"]),
    )


def images_keys(config: TrainConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return what tells the images of training data and benchmark from all others."""
    training = _training_recipe(config, tokenizer).folder
    return training.path.name, _benchmark_recipe(config, tokenizer).folder.path.name


def describe_data(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the prepared data of `config` was made from and what was left out; JSON."""
    recipes = {
        "training": _training_recipe(config, tokenizer),
        "benchmark": _benchmark_recipe(config, tokenizer),
    }
    result = {}
    for name, recipe in recipes.items():
        manifest = recipe.folder.manifest()
        del manifest["items"]
        result[name] = {"folder": str(recipe.folder.path), **manifest}
    return result


def check_batch_size(batch_size: int, samples: PreparedSamples) -> None:
    """Raise UserError if there are fewer training samples than one optimizer step takes."""
    if batch_size > len(samples):
        raise UserError(
            f"batch_size must be at most the number of training samples, "
            f"got {batch_size} and {len(samples)}"
        )


def _training_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the training rows of `config` become samples, in the order of the shuffled rows.

    Raises UserError if a sub-set is not there.
    """
    path, vlm = config.train_dataset_path, config.vlm
    source = training_source(path, config.train_dataset_name, config.min_ratings)
    about = _about("training data", source, config, tokenizer) | {
        "data_cutoff_idx": config.data_cutoff_idx,
        "turns": config.turns,
        "lm_max_length": vlm.max_text_length,
        "lm_eos_token_id": vlm.lm_eos_token_id,
    }
    if config.min_ratings:  # left away else: what was prepared before there were any still counts
        about["min_ratings"] = config.min_ratings
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
        read_text=partial(read_rated_turns, least=config.min_ratings),
        encode=partial(
            encode_turns,
            tokenizer,
            eos_token_id=vlm.lm_eos_token_id,
            max_length=vlm.max_text_length,
            max_turns=1 if config.turns == "first" else None,
        ),
        images=_image_task("images", folder, vlm),
        max_bad_fraction=config.max_bad_fraction,
    )


def _benchmark_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the benchmark's questions become prompts, in its order.

    Raises UserError if it is not there.
    """
    path = config.test_dataset_path
    source = benchmark_source(path)
    folder = PreparedFolder.of(_about("benchmark", source, config, tokenizer), path=path)
    return Recipe(
        what="benchmark",
        folder=folder,
        load=source.load,
        order=np.arange,
        text_column="question",
        encode=partial(encode_questions, tokenizer),
        images=_image_task("image", folder, config.vlm),
        max_bad_fraction=0.0,
        is_whole=True,
        items=partial(benchmark_items, f"test_dataset_path={path!r}"),
    )


def _about(what: str, source: Source, config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the prepared bytes depend on in training data and benchmark alike."""
    return {
        "what": what,
        "source": source.identity,
        "version": VERSION,
        "pillow": PIL.__version__,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vit_img_size": config.vlm.vit_img_size,
        "image_resampling": config.vlm.image_resampling,
    }


def _image_task(column: str, folder: PreparedFolder, vlm: VLMConfig) -> ImageTask:
    file = folder.path / IMAGES_FILE
    return ImageTask(column, vlm.vit_img_size, vlm.image_resampling, file)


def _fields(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PreparedSamples`, memory-mapped."""
    folder, size = recipe.folder, recipe.images.size
    arrays = {"images": folder.mapped(IMAGES_FILE, (manifest["images"], 3, size, size))}
    for name in ("image_index", "tokens", "offsets", "prompt_lengths"):
        arrays[name] = folder.array(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {"slots": ImageSlots.one_each(tensors.pop("image_index")), **tensors}


def _part(samples: PreparedSamples, start: int, stop: int) -> PreparedSamples:
    """Return consecutive samples; all parts share images and tokens."""
    return replace(
        samples,
        slots=samples.slots.part(start, stop),
        offsets=samples.offsets[start : stop + 1],
        prompt_lengths=samples.prompt_lengths[start:stop],
    )
