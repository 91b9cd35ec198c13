"""Single runs of the LCBench benchmark, and the file that keeps what each came to."""

import functools
import json
import tempfile
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.lcbench_curves import SurrogateCurves, cached_scale
from benchmarks.lcbench_methods import METHODS, PLANNED
from benchmarks.lcbench_space import BenchmarkSpace, benchmark_space
from benchmarks.lcbench_surrogate import Surrogate
from benchmarks.replay import memory_folder
from benchmarks.replay_clock import (
    Costs,
    LastValues,
    Leaders,
    PickRule,
    Trace,
    pick_at,
    picks_by,
    simulate,
)
from benchmarks.replay_methods import Setting

SHOWN = (1, 2, 4, 8, 16, 32)
"""Amounts of compute, in full trainings."""

RULES: dict[str, type[PickRule]] = {"last": LastValues, "furthest": Leaders}
"""How the configuration is picked that the regret is of."""

WITHOUT_PICK = 1.0
"""Regret before the first report: that of the median random configuration."""


@dataclass(frozen=True)
class Job:
    """A run that is wanted."""

    method: str
    task: str
    seed: int
    slots: int
    noise: bool
    training_seconds: float | None
    """Of a full training, with which the search's own work and pauses count; None: they do not."""
    trainings: int
    """Compute, in full trainings."""

    @property
    def own_seed(self) -> int:
        """The seed of the run. It differs by task: else the luck of a few random draws would be
        that of all tasks, and the standard errors too small."""
        return zlib.crc32(f"{self.task} {self.seed}".encode())


@dataclass(frozen=True)
class Result:
    """What a run came to; a line of the file."""

    job: Job
    regrets: dict[str, dict[int, float]]
    """By rule and amount of compute."""
    num_trials: int
    num_full: int
    used: float
    """Share of the slots' time in which they trained."""
    search_seconds: float
    """Of a processor, for the search's own work, measured."""
    wall_seconds: float
    """Of the whole run."""

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Result":
        content = json.loads(line)
        content["job"] = Job(**content["job"])
        content["regrets"] = {
            rule: {int(amount): regret for amount, regret in regrets.items()}
            for rule, regrets in content["regrets"].items()
        }
        return cls(**content)

    def answers(self, job: Job) -> bool:
        """Return whether this run is the one that is wanted, as long or longer."""
        same = {**asdict(self.job), "trainings": job.trainings} == asdict(job)
        return same and self.job.trainings >= job.trainings


@dataclass(frozen=True)
class Place:
    """Where runs find what they need."""

    data: Path
    """Folder of the surrogate."""
    cache: Path
    """Folder for the scales of the tasks."""
    peer_python: Path | None = None
    """The interpreter of an environment with Syne Tune."""


def read_results(path: Path) -> list[Result]:
    """Return the runs of a file, none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Result.from_line(line) for line in lines]


def missing(jobs: Iterable[Job], results: Collection[Result]) -> Iterator[Job]:
    """Yield the jobs that no run answers."""
    return (job for job in jobs if not any(result.answers(job) for result in results))


@functools.cache
def load(data: Path) -> tuple[Surrogate, BenchmarkSpace]:
    """Return the surrogate and its space."""
    surrogate = Surrogate(data)
    return surrogate, benchmark_space(surrogate.space)


def run(job: Job, place: Place) -> Result:
    """Run one search on the simulated clock."""
    started = time.perf_counter()
    shown = [amount for amount in SHOWN if amount <= job.trainings]
    if job.method in PLANNED:
        parts = [(amount, *_simulate(job, amount, place)) for amount in shown]
    else:
        curves, trace = _simulate(job, job.trainings, place)
        parts = [(amount, curves, trace) for amount in shown]
    _, _, last = parts[-1]
    return Result(
        job=job,
        regrets={
            name: {
                amount: _regret(job, curves, trace, rule(), amount)
                for amount, curves, trace in parts
            }
            for name, rule in RULES.items()
        },
        num_trials=last.num_trials,
        num_full=last.num_full,
        used=last.spent / (last.time * job.slots),
        search_seconds=last.search_seconds,
        wall_seconds=time.perf_counter() - started,
    )


def _simulate(job: Job, trainings: int, place: Place) -> tuple[SurrogateCurves, Trace]:
    surrogate, space = load(place.data)
    scale = cached_scale(place.cache, surrogate, job.task, space.parameters)
    noise_seed = job.own_seed if job.noise else None
    curves = SurrogateCurves(surrogate, job.task, space.parameters, scale, noise_seed)
    limit = trainings * curves.budget
    rate = curves.budget / job.training_seconds if job.training_seconds else 0
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, ExitStack() as exits:
        setting = Setting(
            curves, space, job.own_seed, job.slots, limit, Path(folder), place.peer_python, exits
        )
        method = METHODS[job.method](setting)
        trace = simulate(curves, method, job.slots, limit, Costs(samples_per_second=rate))
    return curves, trace


def _regret(
    job: Job, curves: SurrogateCurves, trace: Trace, rule: PickRule, trainings: int
) -> float:
    picks = picks_by(rule, trace.reports)
    samples = trainings * curves.budget
    if job.training_seconds:
        row = pick_at(picks, time=samples / job.slots)
    else:
        row = pick_at(picks, spent=samples)
    return WITHOUT_PICK if row is None else curves.regret(row)
