"""Several benchmarks in MMStar's format, and their weighted mean as one score."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from nanovlm.config.schema import TrainConfig
from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar_result import MMStarResult

MAIN = "mmstar"
"""What the benchmark of `test_dataset_path` is called in metrics."""
MEAN_ACCURACY = "mean_accuracy"

T = TypeVar("T")
_TAKEN = (MAIN, "mean", "val", "train")


def benchmark_configs(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return what asks each benchmark alone, by its name: the main one first.

    A further benchmark is called as its folder or repository, in small letters.

    Raises:
        UserError: two have the same name, or one has a name that metrics use otherwise.
    """
    configs = {MAIN: replace(config, more_benchmarks=(), benchmark_weights=None)}
    for path in config.more_benchmarks:
        name = _name(path)
        if name in configs or name in _TAKEN:
            raise UserError(
                f"more_benchmarks: each must have a name of its own in metrics, which is not one "
                f"of {', '.join(_TAKEN)}; {path!r} would be {name!r} again; a folder or link of "
                "another name serves"
            )
        configs[name] = replace(configs[MAIN], test_dataset_path=path)
    return configs


def _name(path: str) -> str:
    """Return `scienceqa_img` for `lmms-lab/ScienceQA-IMG@main`."""
    last = path.partition("@")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")


def for_each(config: TrainConfig, make: Callable[[TrainConfig], T]) -> dict[str, T]:
    """Return what `make` makes of the configuration of each benchmark, by its name.

    Raises UserError as `make`, with the setting that names the benchmark.
    """
    made = {}
    for name, own in benchmark_configs(config).items():
        try:
            made[name] = make(own)
        except UserError as error:
            if name == MAIN:
                raise
            key = "test_dataset_path"  # which names it in `own`
            messages = [message.replace(key, "more_benchmarks") for message in error.messages]
            raise UserError(*messages) from error
    return made


def joint_metrics(config: TrainConfig, results: Mapping[str, MMStarResult]) -> dict[str, float]:
    """Return the metrics of all benchmarks, by the names under which they are reported.

    Of the main one all (`MMStarResult.metrics`), of each further one its accuracy, letter accuracy
    and letter loss, and then the weighted mean of all accuracies.
    """
    metrics = results[MAIN].metrics()
    if len(results) == 1:
        return metrics
    for name, result in results.items():
        if name != MAIN:
            metrics |= {
                f"{name}_accuracy": result.accuracy,
                f"{name}_num_items": float(len(result.correct)),
                f"{name}_letter_accuracy": result.letter_accuracy,
                f"{name}_letter_nll": result.letter_nll,
            }
    weights = config.benchmark_weights or (1.0,) * len(results)
    total = sum(w * result.accuracy for w, result in zip(weights, results.values(), strict=True))
    return metrics | {MEAN_ACCURACY: total / sum(weights)}
