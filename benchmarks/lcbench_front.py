"""How much of the front of accuracy against training time each way of searching finds, on LCBench.

    python -m pip install -e '.[benchmarks]'
    python benchmarks/lcbench_front.py --data FOLDER                    # 6 tasks x 3 seeds, 8 slots
    python benchmarks/lcbench_front.py --data FOLDER --tasks 3945 --seeds 1 --trainings 8

FOLDER is that of `lcbench.py`. The two objectives are the validation accuracy and the training
seconds of a sample, as the surrogate predicts both; reports have the noise of 1,500 questions and
of 5 % in time. Compute is counted in full trainings, whatever their seconds. A search's front is
that of its trials of full length, without noise. The regret is the share of the best known front's
hypervolume that it lacks: between the median accuracy of random configurations and the longest time
on that front; seconds count by their logarithm.
"""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.lcbench_curves import SAMPLES_PER_EPOCH, CurveModel, Scale, SurrogateCurves
from benchmarks.lcbench_runs import load
from benchmarks.lcbench_space import METRIC, BenchmarkSpace
from benchmarks.lcbench_surrogate import CHOOSE, FINAL, KEYS, NUM_EPOCHS
from benchmarks.lcbench_table import difference, estimate
from benchmarks.replay import be_quiet, memory_folder
from benchmarks.replay_clock import simulate
from benchmarks.replay_methods import Build, RandomSearch, Setting, our
from benchmarks.replay_table import values_at
from nanovlm.config.search_settings import Objective, join
from nanovlm.results.pareto import Floats, front_ranks, hypervolume

SHOWN = (4, 8, 16, 32)
"""Amounts of compute, in full trainings."""

SECONDS = "seconds_per_sample"
TIME_NOISE = 0.05
NUM_TASKS = 6
"""The first of those by which methods are chosen."""

_NUM_SAMPLED, _NUM_NEIGHBOURS, _MOST_KEPT = 20_000, 20, 300
_STEPS = (0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01)
"""How far the search for the best known front moves a coordinate, by round."""

METHODS: dict[str, Build] = {
    "random, full": lambda s: RandomSearch(s.table, s.seed),
    "random + asha, pausing": our("random", "asha", type="pausing", rungs=3),
    "tpe + asha, pausing": our("tpe", "asha", type="pausing", rungs=3),
    "auto + asha, pausing": our("auto", "asha", type="pausing", rungs=3),
    "auto + asha, accuracy alone": lambda s: our("auto", "asha", type="pausing", rungs=3)(
        dataclasses.replace(
            s, space=dataclasses.replace(s.space, objective=Objective(metric=METRIC))
        )
    ),
}


class TimedModel(CurveModel, Protocol):
    """What predicts learning curves and how long they take."""

    def seconds(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray: ...


class FrontCurves(SurrogateCurves):
    """Curves of a task that tell the seconds of a sample too."""

    def __init__(self, surrogate: TimedModel, task: str, space: BenchmarkSpace, seed: int) -> None:
        super().__init__(surrogate, task, space.parameters, Scale(1.0, 0.0), noise_seed=seed)
        self._times = list[np.ndarray]()
        self._seed, self._clock = seed, surrogate

    def row_of(self, values: Mapping[str, Any]) -> int:
        epochs = np.arange(1, NUM_EPOCHS + 1)
        configuration = np.array([[float(values[key]) for key in KEYS]] * NUM_EPOCHS)
        seconds = self._clock.seconds(self.task, configuration, epochs)
        self._times.append(seconds / (epochs * SAMPLES_PER_EPOCH))
        return super().row_of(values)

    def others(self, row: int, column: int) -> tuple[float]:
        random = np.random.default_rng([self._seed, row, column, 1])
        return (float(self._times[row][column]) * float(np.exp(random.normal(0, TIME_NOISE))),)

    def loss(self, row: int) -> tuple[float, float]:
        """Return what a full training comes to, without noise, less is better."""
        return -float(self._exact[row][-1]), float(np.log(self._times[row][-1]))


@dataclasses.dataclass(frozen=True)
class BestFront:
    """The best that is known of a task."""

    volume: float
    reference: Floats

    def regret(self, losses: Floats) -> float:
        return 1 - hypervolume(losses.reshape(-1, 2), self.reference) / self.volume


def find_front(surrogate: TimedModel, task: str, space: BenchmarkSpace) -> BestFront:
    """Return the front of random configurations and of a local search from it."""

    def losses_at(points: Floats) -> Floats:
        columns = {p.key: values_at(p, points[:, i]) for i, p in enumerate(space.parameters)}
        rows = np.array([columns[key] for key in KEYS], dtype=float).T
        seconds = surrogate.seconds(task, rows, NUM_EPOCHS) / (NUM_EPOCHS * SAMPLES_PER_EPOCH)
        accuracies = surrogate.accuracies(task, rows, NUM_EPOCHS)
        return np.stack([-accuracies, np.log(seconds)], axis=1)

    random = np.random.default_rng(0)
    points = random.uniform(size=(_NUM_SAMPLED, len(space.parameters)))
    losses = losses_at(points)
    median = float(np.median(losses[:, 0]))
    for step in _STEPS:
        useful = np.flatnonzero((front_ranks(losses) == 0) & (losses[:, 0] < median))
        _, first = np.unique(losses[useful], axis=0, return_index=True)  # along the front
        spread = np.linspace(0, len(first) - 1, min(len(first), _MOST_KEPT)).astype(int)
        points, losses = points[useful[first[spread]]], losses[useful[first[spread]]]
        shape = (len(points), _NUM_NEIGHBOURS, points.shape[1])
        moves = random.normal(scale=step, size=shape) * (random.random(shape) < 0.5)
        near = np.clip(points[:, None] + moves, 0, 1).reshape(-1, points.shape[1])
        points = np.concatenate([points, near])
        losses = np.concatenate([losses, losses_at(near)])
    front = losses[(front_ranks(losses) == 0) & (losses[:, 0] < median)]
    reference = np.array([median, float(front[:, 1].max()) + 1e-9])
    return BestFront(hypervolume(front, reference), reference)


@functools.cache
def best_front(data: Path, task: str) -> BestFront:
    """Return the best front that is known of a task; found once in a process."""
    surrogate, space = load(data)
    return find_front(surrogate, task, space)


def regrets(
    method: str, task: str, seed: int, data: Path, slots: int, trainings: int
) -> dict[int, float]:
    """Return the regret of one search by amount of compute."""
    surrogate, space = load(data)
    front = best_front(data, task)
    both = join([Objective(metric=METRIC), Objective.model_validate({"metric": SECONDS})])
    space = dataclasses.replace(space, objective=both)
    own_seed = zlib.crc32(f"{task} {seed}".encode())
    curves = FrontCurves(surrogate, task, space, own_seed)
    limit = trainings * curves.budget
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        setting = Setting(curves, space, own_seed, slots, limit, Path(folder))
        trace = simulate(curves, METHODS[method](setting), slots, limit)
    return {
        amount: front.regret(
            np.array(
                [
                    curves.loss(report.row)
                    for report in trace.reports
                    if report.column == curves.last and report.spent <= amount * curves.budget
                ]
            )
        )
        for amount in SHOWN
        if amount <= trainings
    }


def main() -> None:
    arguments = parse_arguments()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # of the processes that begin now
    runs = list(itertools.product(METHODS, arguments.tasks, range(arguments.seeds)))
    jobs = [(*run, arguments.data, arguments.slots, arguments.trainings) for run in runs]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, be_quiet) as pool:
        found = pool.starmap(regrets, jobs, chunksize=1)
    results = dict(zip(runs, found, strict=True))
    print(
        f"{arguments.slots} slots, {len(arguments.tasks)} tasks x {arguments.seeds} seeds; "
        "hypervolume regret (standard error) by full trainings, and less random search in full"
    )
    amounts = [amount for amount in SHOWN if amount <= arguments.trainings]
    for method in METHODS:
        print(f"{method:<28}" + "".join(row_of(results, method, amounts)))


def row_of(
    results: Mapping[tuple[str, str, int], Mapping[int, float]],
    method: str,
    amounts: Sequence[int],
) -> list[str]:
    """Return the cells of a method: its mean regret and its paired difference, by amount."""
    cells = []
    for amount in amounts:
        ours, base = (
            {(task, seed): r[amount] for (name, task, seed), r in results.items() if name == each}
            for each in (method, next(iter(METHODS)))
        )
        own, gap = estimate([*ours.values()]), difference(ours, base)
        assert own is not None and gap is not None, "there are runs"
        cells.append(f"  {own.mean:.3f} ({own.error:.3f}) {gap.mean:+.3f} ({gap.error:.3f})")
    return cells


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the surrogate")
    add("--tasks", nargs="+", choices=(*CHOOSE, *FINAL), default=CHOOSE[:NUM_TASKS], metavar="ID")
    add("--seeds", type=int, default=3)
    add("--slots", type=int, default=8, help="trials at once")
    add("--trainings", type=int, default=SHOWN[-1], choices=SHOWN, help="compute of a run")
    add("--jobs", type=int, default=1, help="processes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
