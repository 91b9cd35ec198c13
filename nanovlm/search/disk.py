"""How much disk a search may take at most, and whether there is so much.

Files that can still be needed are kept, and no others, so the peak does not grow with the number
of trials but for their answers and logs.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovlm.config import TrainConfig
from nanovlm.errors import UserError
from nanovlm.files import free_bytes, gib
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.search.space import SearchSpace
from nanovlm.training.optim import FROZEN_PREFIXES, group_parameters

POLICY = """\
Kept on disk are only files that can still be needed:

- of each running trial the state of its last report, and while a new one is written both;
- the final models of as many of the best trials as will be raced, and for the moment of the
  exchange one more; `best/` is a second name for one of the models kept;
- until the winner is known the models of the confirming runs, `confirm.runs` at most, after it
  that of the run that `best/` is of;
- of every ended trial its answers, its line in `trials.jsonl` and its log lines.

A state holds the weights and, of what is trained, AdamW's two moments, all in float32."""
"""What is kept, in words, as docs/results.md has it."""

_FLOAT32 = 4
_STATE_EXTRA = 2**20
"""Bytes of a state besides tensors: random states, the reports so far, step and order of data."""
_ANSWER_BYTES = 256
"""Of a question's line; about 130 for the short answers of the benchmark."""
_TRIAL_BYTES = 64 * 2**10
"""Of a trial's lines in trials.jsonl, the study and the logs: some 20 KiB with four reports."""
_SLOT_BYTES = 16 * 2**20
"""Of a worker group's logs and Ray's session files."""
_SHAPE_KEYS = ("vlm.mp_pixel_shuffle_factor", "freeze")
"""Keys that can be searched and change the size of a model or of a state."""


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

    @property
    def total(self) -> int:
        return self.states + self.models + self.answers_and_logs


def disk_peak(
    space: SearchSpace, *, num_trials: int, concurrency: int, num_questions: int
) -> DiskPeak:
    """Return the most bytes that a search takes at a time, by POLICY."""
    sizes = [_sizes(config) for config in _largest_configs(space)]
    model = max(model for model, _ in sizes)
    state = max(state for _, state in sizes)
    num_models = max(1, space.confirm.num_raced) + 1 + space.confirm.most_runs
    num_runs = num_trials + space.confirm.most_runs
    return DiskPeak(
        model=model,
        state=state,
        states=concurrency * 2 * state,
        models=num_models * model,
        answers_and_logs=num_runs * (num_questions * _ANSWER_BYTES + _TRIAL_BYTES)
        + concurrency * _SLOT_BYTES,
    )


def check_disk(peak: DiskPeak, folder: Path) -> None:
    """Raise UserError if the search would not fit where its results folder lies.

    What the folder of a search that goes on holds already is part of the peak.
    """
    free = free_bytes(folder)
    held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if peak.total > free + held:
        raise UserError(
            f"--results: the search takes up to {gib(peak.total)} in {folder.parent}, where "
            f"{gib(free)} are free; its trials' states are {gib(peak.states)} of it and the models "
            f"that are kept {gib(peak.models)}; lower --concurrency or confirm.runs, or choose "
            "another disk"
        )


def _largest_configs(space: SearchSpace) -> list[TrainConfig]:
    """Return the base with every choice of the keys that change sizes."""
    searched = [parameter for parameter in space.parameters if parameter.key in _SHAPE_KEYS]
    choices: list[tuple[Any, ...]] = [tuple(parameter.values) for parameter in searched]
    keys = [parameter.key for parameter in searched]
    return [space.config_for(dict(zip(keys, v, strict=True))) for v in itertools.product(*choices)]


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Return the bytes of a model and of a training state; allocates no weights."""
    with torch.device("meta"):
        model = VisionLanguageModel(config.vlm)
    rates = {"mp": config.lr_mp, "backbones": config.lr_backbones}
    trained = sum(
        parameter.numel()
        for group, named in group_parameters(model).items()
        for name, parameter in named.items()
        if rates[group] > 0 and not name.startswith(FROZEN_PREFIXES[config.freeze])
    )
    # A tied head is one parameter, and one tensor of the file.
    weights = sum(parameter.numel() for parameter in model.parameters()) * _FLOAT32
    return weights, weights + 2 * trained * _FLOAT32 + _STATE_EXTRA
