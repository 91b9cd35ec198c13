"""Training data and benchmark as tensors over files: decoded and encoded once for all who use them.

What is prepared lies on the disk (`nanovlm.data.cache`) and is mapped into memory: trials, workers
and later searches share one copy in the page cache.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.build import OnProgress, Recipe, build, log_progress
from nanovlm.data.cache import IMAGES_FILE
from nanovlm.data.recipes import benchmark_recipe, training_recipe
from nanovlm.data.rows import num_rows
from nanovlm.data.samples import ImageSlots, Mixture, PreparedSamples
from nanovlm.data.tokenizer import check_tokens
from nanovlm.errors import UserError


def prepare_training(
    config: TrainConfig, tokenizer: Tokenizer, on_progress: OnProgress = log_progress
) -> tuple[PreparedSamples, PreparedSamples]:
    """Return the samples for training and for validation, prepared now if they were not before.

    The rows of all sub-sets are shuffled, the first `data_cutoff_idx` kept, and the last
    `val_ratio` of these (at least one, unless it is 0) are for validation. Every turn of a row is
    a sample, or its first one alone (`turns`); it sees the row's first image. In 8k the turns of a
    row are one sample, which sees all its images.

    Raises:
        UserError: data or tokenizer do not fit the configuration, or too few samples are left.
    """
    check_tokens(config.vlm, tokenizer)
    recipe = training_recipe(config, tokenizer)
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
    if config.train_dataset_weights is not None:
        index = _subset_index(recipe)[:num_train]
        names = range(len(config.train_dataset_name))
        members = tuple(np.flatnonzero(index == number) for number in names)
        train = replace(train, mixture=Mixture(members, config.train_dataset_weights))
    check_batch_size(config.batch_size, train)
    return train, val


def _subset_index(recipe: Recipe) -> np.ndarray:
    """Return the number of each sample's sub-set, int64[N]."""
    sizes = [num_rows(groups) for groups in recipe.load().values()]
    rows = recipe.order(sum(sizes))[recipe.folder.array("places")]
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def prepare_benchmark(
    config: TrainConfig, tokenizer: Tokenizer, on_progress: OnProgress = log_progress
) -> PreparedBenchmark:
    """Return the benchmark's questions as prompts, in its order; prepared now if need be.

    Raises:
        UserError: data or tokenizer do not fit the configuration, or an image cannot be read: a
            score over fewer questions would be another benchmark's.
    """
    check_tokens(config.vlm, tokenizer)
    recipe = benchmark_recipe(config, tokenizer)
    manifest = build(recipe, on_progress)
    items, fields = manifest["items"], _fields(recipe, manifest)
    for name in ("prompt_lengths", "is_learnt"):  # a prompt is all that there is
        fields.pop(name, None)
    return PreparedBenchmark(
        **fields,
        answers=tuple(items["answer"]),
        categories=tuple(items["category"]),
        l2_categories=tuple(items["l2_category"]),
        indices=tuple(items["index"]),
    )


def images_keys(config: TrainConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return what tells the images of training data and benchmark from all others."""
    recipes = training_recipe(config, tokenizer), benchmark_recipe(config, tokenizer)
    training, benchmark = (recipe.folder.path.name for recipe in recipes)
    return training, benchmark


def describe_data(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the prepared data of `config` was made from and what was left out; JSON."""
    recipes = {
        "training": training_recipe(config, tokenizer),
        "benchmark": benchmark_recipe(config, tokenizer),
    }
    result = {}
    for name, recipe in recipes.items():
        manifest = recipe.folder.manifest()
        del manifest["items"]
        result[name] = {"folder": str(recipe.folder.path), **manifest}
    return result


def check_batch_size(batch_size: int, samples: PreparedSamples) -> None:
    """Raise UserError if there are fewer training samples than one optimizer step takes."""
    if batch_size > samples.epoch_size:
        raise UserError(
            f"batch_size must be at most the number of training samples, "
            f"got {batch_size} and {samples.epoch_size}"
        )


def _fields(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PreparedSamples`, memory-mapped."""
    folder, size = recipe.folder, recipe.images.size
    num_images = manifest["tiles" if recipe.is_tiled else "images"]
    fields = {"images": _tensor(folder.mapped(IMAGES_FILE, (num_images, 3, size, size)))}
    for name in ("tokens", "offsets", "prompt_lengths"):
        fields[name] = _tensor(folder.array(name))
    if not recipe.is_tiled:
        return {"slots": ImageSlots.one_each(_tensor(folder.array("image_index"))), **fields}
    slots = (_tensor(folder.array(f"tile_{name}")) for name in ("index", "offsets", "places"))
    is_learnt = _tensor(folder.array("is_learnt"))
    return {"slots": ImageSlots(*slots), **fields, "is_learnt": is_learnt}


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _part(samples: PreparedSamples, start: int, stop: int) -> PreparedSamples:
    """Return consecutive samples; all parts share images and tokens."""
    return replace(
        samples,
        slots=samples.slots.part(start, stop),
        offsets=samples.offsets[start : stop + 1],
        prompt_lengths=samples.prompt_lengths[start:stop],
    )
