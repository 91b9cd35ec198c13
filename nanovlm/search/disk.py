"""How much disk a search may need at most, and whether it is free.

Files that can still be needed are kept, and no others (docs/results.md), so the peak does not grow
with the number of trials but for their answers and logs. A state holds the weights and, of what is
trained, AdamW's two moments, all in float32.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovlm.config.fields import Scalar
from nanovlm.config.parameter import Parameter
from nanovlm.config.schema import STAND_INS, TrainConfig, VLMConfig
from nanovlm.config.search_settings import Scheduler
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.files import free_bytes, gib
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.optim import group_parameters

_FLOAT32 = 4
_STATE_EXTRA = 2**20
"""Bytes of a state besides tensors: random states, the reports, step and order of data."""
_ANSWER_BYTES = 256
"""Of a question's line; about 130 for the short answers of the benchmark."""
_TRIAL_BYTES = 64 * 2**10
"""Of a trial's lines in trials.jsonl, the study and the logs: some 20 KiB with four reports."""
_SLOT_BYTES = 16 * 2**20
"""Of a worker group's logs and Ray's session files."""
_SHAPE_KEYS = ("vlm.mp_pixel_shuffle_factor", "freeze")
"""Keys that can be searched and change the size of a model or of a state."""
_RATES = ("lr_mp", "lr_backbones", *STAND_INS)
"""Keys that change it if they are 0."""


@dataclass(frozen=True)
class DiskPeak:
    """Bytes that a search takes at most."""

    model: int
    """Of one saved model."""
    state: int
    """Of one training state."""
    states: int
    """Of all running trials."""
    models: int
    """Of the best trials and the confirming runs."""
    answers_and_logs: int
    paused: int = 0
    """Of the states of paused trials."""

    @property
    def total(self) -> int:
        return self.states + self.paused + self.models + self.answers_and_logs


def disk_peak(
    space: SearchSpace,
    *,
    num_trials: int,
    concurrency: int,
    num_questions: int,
    num_paused: int | None = None,
) -> DiskPeak:
    """Return the most bytes that a search takes at a time.

    Args:
        num_paused: states of paused trials; None takes as many as must have room: those that
            `scheduler.max_paused` asks for.
    """
    if num_paused is None:
        num_paused = min(space.scheduler.max_paused or 0, num_trials)
    sizes = [_sizes(config) for config in _largest_configs(space)]
    model = max(model for model, _ in sizes)
    state = max(state for _, state in sizes)
    num_best = max(1, space.confirm.num_raced)
    if len(space.objective.all) > 1:
        num_best = _most_full_trials(space.scheduler, num_trials)
    num_models = num_best + 1 + space.confirm.most_runs
    num_runs = num_trials + space.confirm.most_runs
    return DiskPeak(
        model=model,
        state=state,
        states=concurrency * 2 * state,
        paused=num_paused * state,
        models=num_models * model,
        answers_and_logs=num_runs * (num_questions * _ANSWER_BYTES + _TRIAL_BYTES)
        + concurrency * _SLOT_BYTES,
    )


def _most_full_trials(scheduler: Scheduler, num_trials: int) -> int:
    """Return about how many trials run in full at most, and may be on the front. One that went on
    early and fell back later does not count against the quota, so there may be twice as many."""
    if scheduler.name != "asha":
        return num_trials
    quota = math.ceil(num_trials / scheduler.reduction_factor ** (scheduler.rungs - 1))
    return min(num_trials, 2 * quota)


def check_disk(peak: DiskPeak, folder: Path) -> int:
    """Return the bytes that a search may have where its results folder lies.

    What the folder of a search that goes on holds already is part of the peak.

    Raises:
        UserError: the search would not fit there.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    room = free_bytes(folder) + sum(path.stat().st_size for path in files)
    if peak.total > room:
        also = ", scheduler.max_paused" if peak.paused else ""
        raise UserError(
            f"--results: the search takes up to {gib(peak.total)} in {folder.parent}, where "
            f"{gib(free_bytes(folder))} are free; its trials' states are "
            f"{gib(peak.states + peak.paused)} of it and the models that are kept "
            f"{gib(peak.models)}; lower --concurrency{also} or confirm.runs, or choose another disk"
        )
    return room


def image_bytes(vlm: VLMConfig) -> int:
    """Return the bytes that a prepared image takes, or each tile where it is cut into tiles."""
    return 3 * vlm.vit_img_size**2


def max_paused_states(space: SearchSpace, peak: DiskPeak, room: int) -> int:
    """Return how many states of paused trials a search keeps at most.

    Those are `scheduler.max_paused`; if that is null, as many as half of the room beside the rest
    of the search takes, since others may want the disk too.

    Args:
        peak: of the search.
        room: bytes that the search may have.
    """
    if space.scheduler.max_paused is not None:
        return space.scheduler.max_paused
    return max(0, room - peak.total) // 2 // peak.state


def _largest_configs(space: SearchSpace) -> list[TrainConfig]:
    """Return the base with every choice of the keys that change sizes, and nothing frozen by a
    learning rate that can be above 0."""
    choices: dict[str, tuple[Any, ...]] = {
        parameter.key: _largest_values(parameter)
        for parameter in space.parameters
        if parameter.key in (*_SHAPE_KEYS, *_RATES)
    }
    return [
        space.config_for(dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


def _largest_values(parameter: Parameter) -> tuple[Scalar, ...]:
    if parameter.key in _SHAPE_KEYS:
        return parameter.values
    above_0 = [value for value in parameter.values if value]
    null = [value for value in parameter.values if value is None]  # what stands in may be above 0
    return (*above_0, *null, *parameter.values)[:1]


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Return the bytes of a model and of a training state; allocates no weights."""
    with torch.device("meta"):
        model = VisionLanguageModel(config.vlm)
    rates = config.peak_learning_rates
    trained = sum(
        parameter.numel()
        for group, named in group_parameters(model).items()
        for parameter in named.values()
        if rates[group] > 0
    )
    # A tied head is one parameter, and one tensor of the file.
    weights = sum(parameter.numel() for parameter in model.parameters()) * _FLOAT32
    return weights, weights + 2 * trained * _FLOAT32 + _STATE_EXTRA
