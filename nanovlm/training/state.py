"""The state of a training between two steps, and the file that keeps it.

A training that starts from it takes the same steps as one that was never interrupted: on CPU to the
last bit. What depends on the step alone, learning rates and the order of the data, is not in it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nanovlm.files import remove_parts, replacing
from nanovlm.messages import Report
from nanovlm.records import reports_from_json, reports_to_json

STATE_FILE = "state.safetensors"

_ABOUT = "about"
_UNREADABLE = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError)
_MODEL, _OPTIMIZER, _RANDOM = "model.", "optimizer.", "random."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A training after `step` optimizer steps."""

    step: int
    loss_sum: float
    loss_weight: float
    """Of the smoothed training loss."""
    micro_batch_limit: int | None
    """Samples of a pass that have been found to fit into the memory."""
    random: tuple[Tensor, ...]
    """uint8[any]: what dropout draws from, of each rank."""
    tensors: Mapping[str, Tensor]
    """Weights and AdamW's state, by name; those of the training itself unless they were read."""


@dataclasses.dataclass(frozen=True)
class SavedTrial:
    """A trial that was cut off after its last report."""

    training: TrainingState
    reports: tuple[Report, ...]


def collect_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return weights and AdamW's state by name; no copies."""
    tensors = {
        f"{_MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()
    }
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in values.items()}
    return tensors


@torch.no_grad()
def restore_tensors(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Set weights, in place, and AdamW's state to what `collect_tensors` returned."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"{_MODEL}{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def write_state(
    folder: Path, training: TrainingState, reports: Sequence[Report], belongs_to: Mapping[str, Any]
) -> None:
    """Replace the state in `folder`; a kill at any moment leaves the old one or the new one.

    A state of the same trial that has come further stays: workers may outlive a program that was
    killed, and this one may be such a worker's, with a new one at work already.

    Args:
        reports: all that the trial has made.
        belongs_to: what a trial must have in common with this one to continue from here; JSON.
    """
    if _step_on_disk(folder, belongs_to) >= training.step:
        return
    about = {
        "step": training.step,
        "loss_sum": training.loss_sum,
        "loss_weight": training.loss_weight,
        "micro_batch_limit": training.micro_batch_limit,
        "reports": reports_to_json(reports),
        "belongs_to": belongs_to,
    }
    random = {f"{_RANDOM}{rank}": state for rank, state in enumerate(training.random)}
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    tensors = {name: tensor.contiguous() for name, tensor in {**training.tensors, **random}.items()}
    with replacing(folder / STATE_FILE) as part:
        save_file(tensors, part, {_ABOUT: json.dumps(about)})


def _step_on_disk(folder: Path, belongs_to: Mapping[str, Any]) -> int:
    """Return the step of the state in `folder`; -1 if there is none that can be used."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            about, differing = _read_about(file, belongs_to)
            step: int = about["step"]
    except _UNREADABLE:
        return -1
    return -1 if differing else step


def read_state(folder: Path, belongs_to: Mapping[str, Any]) -> SavedTrial | str | None:
    """Return the state in `folder`, None if there is none, or why it cannot be used."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about, differing = _read_about(file, belongs_to)
            if differing:
                return f"the state in {folder} is of a trial with other {', '.join(differing)}"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        random = [name for name in tensors if name.startswith(_RANDOM)]
        training = TrainingState(
            step=about["step"],
            loss_sum=about["loss_sum"],
            loss_weight=about["loss_weight"],
            micro_batch_limit=about["micro_batch_limit"],
            random=tuple(tensors.pop(f"{_RANDOM}{rank}") for rank in range(len(random))),
            tensors=tensors,
        )
        return SavedTrial(training, reports_from_json(about["reports"]))
    except _UNREADABLE as error:
        return f"the state in {folder} cannot be read: {error}"


def _read_about(file: safe_open, belongs_to: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a state is of, and the keys of `belongs_to` in which it differs."""
    about = json.loads(file.metadata()[_ABOUT])
    theirs, ours = about["belongs_to"], json.loads(json.dumps(belongs_to))
    return about, [key for key in ours if theirs.get(key) != ours[key]]
