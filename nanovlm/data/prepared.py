"""Training data and benchmark as tensors over files: decoded and encoded once for all who use them.

What is prepared lies on the disk (`nanovlm.data.cache`) and is mapped into memory: trials, workers
and later searches share one copy in the page cache.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm.config.schema import TrainConfig
from nanovlm.data.build import OnProgress, Recipe, build, log_progress
from nanovlm.data.left_out import check_bad_rows
from nanovlm.data.processors import check_tokens
from nanovlm.data.recipes import benchmark_recipe, training_recipe
from nanovlm.data.tensors import PreparedBenchmark, PreparedSamples
from nanovlm.errors import UserError


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
    recipe = training_recipe(config, tokenizer)
    build(recipe, on_progress)
    manifest = recipe.folder.manifest()
    bad, num_usable = manifest["bad_rows"], manifest["usable_rows"]
    check_bad_rows(recipe.what, bad, num_usable, config.max_bad_fraction)
    num_val = _num_validation_rows(manifest["rows"], config.val_ratio)
    places = recipe.folder.array("places")
    num_train = int(np.searchsorted(places, manifest["rows"] - num_val))
    everything = _samples(recipe, manifest)
    train, val = _part(everything, 0, num_train), _part(everything, num_train, len(places))
    if not len(train):
        over_long = sum(subset["over_long_turns"] for subset in manifest["subsets"].values())
        raise UserError(
            f"train_dataset_path={config.train_dataset_path!r}: no training sample is left; of "
            f"{manifest['rows']} rows {num_val} are for validation (val_ratio={config.val_ratio}), "
            f"and {over_long} turns exceed vlm.lm_max_length={config.vlm.lm_max_length} tokens"
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
    recipe = benchmark_recipe(config, tokenizer)
    build(recipe, on_progress)
    manifest = recipe.folder.manifest()
    samples, items = _samples(recipe, manifest), manifest["items"]
    return PreparedBenchmark(
        images=samples.images,
        image_index=samples.image_index,
        tokens=samples.tokens,
        offsets=samples.offsets,
        answers=tuple(items["answer"]),
        categories=tuple(items["category"]),
        l2_categories=tuple(items["l2_category"]),
        indices=tuple(items["index"]),
    )


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
    if batch_size > len(samples):
        raise UserError(
            f"batch_size must be at most the number of training samples, "
            f"got {batch_size} and {len(samples)}"
        )


def _num_validation_rows(num_rows: int, val_ratio: float) -> int:
    return max(1, round(num_rows * val_ratio)) if val_ratio else 0


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)  # nobody writes to it


def _samples(recipe: Recipe, manifest: Mapping[str, Any]) -> PreparedSamples:
    folder, size = recipe.folder, recipe.image_size
    return PreparedSamples(
        images=_tensor(folder.images((manifest["images"], 3, size, size))),
        **{
            name: _tensor(folder.array(name))
            for name in ("image_index", "tokens", "offsets", "prompt_lengths")
        },
    )


def _part(samples: PreparedSamples, start: int, stop: int) -> PreparedSamples:
    """Return consecutive samples; all parts share images and tokens."""
    return PreparedSamples(
        images=samples.images,
        image_index=samples.image_index[start:stop],
        tokens=samples.tokens,
        offsets=samples.offsets[start : stop + 1],
        prompt_lengths=samples.prompt_lengths[start:stop],
    )
