"""The learning curves of one task of LCBench, as the simulated clock takes them.

Each trial has a row of its own, so that two trials of one configuration are noisy by themselves.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.lcbench_space import NUM_QUESTIONS
from benchmarks.lcbench_surrogate import KEYS, NUM_EPOCHS
from benchmarks.replay_table import value_at, values_at
from nanovlm.config.parameter import Parameter

SAMPLES_PER_EPOCH = 1000
_NUM_SAMPLED, _NUM_KEPT, _NUM_NEIGHBOURS = 20_000, 20, 100
_STEPS = (0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01)
"""How far the local search moves a coordinate of the unit cube (standard deviation), by round."""


class CurveModel(Protocol):
    """What predicts learning curves, see `lcbench_surrogate.py`."""

    def curve(self, task: str, values: Mapping[str, Any]) -> np.ndarray: ...

    def accuracies(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Scale:
    """What the regret of a task is measured by: final accuracies, without noise."""

    best: float
    """The best that is known."""
    median: float
    """Of random configurations."""

    def regret(self, accuracy: float) -> float:
        """Return 0 for the best known and 1 for the median random configuration."""
        return (self.best - accuracy) / (self.best - self.median)


class SurrogateCurves:
    """The curves of a task; a row is a trial, a column an epoch."""

    def __init__(
        self,
        surrogate: CurveModel,
        task: str,
        parameters: tuple[Parameter, ...],
        scale: Scale,
        noise_seed: int | None = None,
        num_epochs: int = NUM_EPOCHS,
    ) -> None:
        """
        Args:
            noise_seed: reports are accuracies on NUM_QUESTIONS questions, drawn by this seed, the
                trial and the epoch; None: reports are exact.
            num_epochs: of a full training; fewer break it off.
        """
        self._surrogate, self.task = surrogate, task
        self.parameters, self.scale = parameters, scale
        self._noise_seed = noise_seed
        self._num_epochs = num_epochs
        self._exact = list[np.ndarray]()

    def of(
        self, task: str | None = None, noise_seed: int | None = None, num_epochs: int = NUM_EPOCHS
    ) -> "SurrogateCurves":
        """Return the curves of a search of its own on this task or another one."""
        task = task or self.task
        return SurrogateCurves(
            self._surrogate, task, self.parameters, self.scale, noise_seed, num_epochs
        )

    @property
    def budget(self) -> int:
        return self._num_epochs * SAMPLES_PER_EPOCH

    @property
    def last(self) -> int:
        return self._num_epochs - 1

    def row_of(self, values: Mapping[str, Any]) -> int:
        self._exact.append(self._surrogate.curve(self.task, values))
        return len(self._exact) - 1

    def row_at(self, point: np.ndarray) -> int:
        places = zip(self.parameters, point, strict=True)
        return self.row_of({p.key: value_at(p, place) for p, place in places})

    def samples(self, row: int, column: int) -> int:
        return (column + 1) * SAMPLES_PER_EPOCH

    def value(self, row: int, column: int) -> float:
        exact = float(self._exact[row][column])
        if self._noise_seed is None:
            return exact
        random = np.random.default_rng([self._noise_seed, row, column])
        return float(random.binomial(NUM_QUESTIONS, exact)) / NUM_QUESTIONS

    def column(self, row: int, milestone: int) -> int:
        return -(-milestone // SAMPLES_PER_EPOCH) - 1

    def column_of_share(self, share: float) -> int:
        return self.column(0, round(share * self.budget))

    def regret(self, row: int) -> float:
        """Return what a trial's full training lacks, without noise: see `Scale`."""
        return self.scale.regret(float(self._exact[row][-1]))


def find_scale(surrogate: CurveModel, task: str, parameters: tuple[Parameter, ...]) -> Scale:
    """Return a task's scale: random configurations, and a local search from the best of them."""
    random = np.random.default_rng(0)
    points = random.uniform(size=(_NUM_SAMPLED, len(parameters)))
    finals = _finals(surrogate, task, parameters, points)
    median = float(np.median(finals))
    for step in _STEPS:
        kept = np.argsort(-finals, kind="stable")[:_NUM_KEPT]
        points, finals = points[kept], finals[kept]
        # Some coordinates stay, since optima lie at the ends of ranges.
        moves = random.normal(scale=step, size=(_NUM_KEPT, _NUM_NEIGHBOURS, len(parameters)))
        moves *= random.random(moves.shape) < 0.5
        near = np.clip(points[:, None] + moves, 0, 1).reshape(-1, len(parameters))
        points = np.concatenate([points, near])
        finals = np.concatenate([finals, _finals(surrogate, task, parameters, near)])
    return Scale(float(finals.max()), median)


def _finals(
    surrogate: CurveModel, task: str, parameters: tuple[Parameter, ...], points: np.ndarray
) -> np.ndarray:
    """Return the accuracies of full trainings at float[n, parameters] of the unit cube."""
    columns = {p.key: values_at(p, points[:, i]) for i, p in enumerate(parameters)}
    rows = np.array([columns[key] for key in KEYS], dtype=float).T
    return surrogate.accuracies(task, rows, NUM_EPOCHS)


def cached_scale(
    cache: Path, surrogate: CurveModel, task: str, parameters: tuple[Parameter, ...]
) -> Scale:
    """Return a task's scale from the folder `cache`, where it is written the first time."""
    path = cache / f"scale-{task}.json"
    if path.exists():
        return Scale(**json.loads(path.read_text()))
    scale = find_scale(surrogate, task, parameters)
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(scale)))
    return scale
