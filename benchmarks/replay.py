"""How good a configuration each way of searching finds for its compute, on recorded trainings.

    python benchmarks/replay.py                          # 200 seeds, 8 trials at once
    python benchmarks/replay.py --concurrency 1 8 64 --out curves.csv
    python benchmarks/replay.py --by time                # slots count whether they train or not
    python benchmarks/replay.py --methods "auto + asha, pausing" "auto, after a third (4)"

240 random configurations of the digits were trained in full (`record_curves.py`); a trial of a
replayed search has the learning curve of the recorded configuration that is nearest to its own.
Searchers and schedulers are those of real searches. Compute is counted in full trainings; regret is
what the full-length accuracy of the configuration that a method would pick lacks to the best of the
240. The last columns say how much less compute than random search a method needs for the regret
that random search reaches with 8 full trainings. By time, a slot that waits costs as much as one
that trains.
"""

import argparse
import csv
import functools
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.replay_clock import Trace, simulate
from benchmarks.replay_methods import METHODS, Build, Setting
from benchmarks.replay_table import CurveTable, load_curves
from benchmarks.transfer import after
from nanovlm.config.space import SearchSpace, load_space

DATA = Path(__file__).parent / "data" / "digits_curves.jsonl"
THIRD = DATA.with_name("digits_third_curves.jsonl")
"""Trainings of one epoch instead of three: `record_curves.py --trials 60 --out FILE epochs=1`."""
SPACE = """
preset: digits
search:
  lr_mp:        {log_uniform: [1.0e-4, 3.0e-2]}
  lr_backbones: {log_uniform: [3.0e-5, 1.0e-2]}
  batch_size:   {choice: [16, 32, 64]}
"""
SHOWN = (1, 2, 4, 8, 12)
REFERENCE = "random, full"
REFERENCE_COMPUTE = 8
GRID = np.arange(0.1, SHOWN[-1] + 0.05, 0.1)
"""Full trainings at which the regret is read."""
TRANSFERS: dict[str, Build] = {
    f"auto, after a third ({trainings})": after(
        lambda setting: load_curves(THIRD, setting.table.parameters), trainings
    )
    for trainings in (1, 4)
}
"""After an earlier search at a third of the length, with the compute of so many full trainings."""

HEADS = {"compute": "after full trainings", "time": "slots' time for so many"}
"""By what the regret is read, and how the table says so."""


def main() -> None:
    arguments = parse_arguments()
    for concurrency in arguments.concurrency:
        regrets: dict[str, np.ndarray] = {}
        print(f"\n{concurrency} trials at once, {arguments.seeds} seeds; median regret (quartiles)")
        unit = HEADS[arguments.by]
        print(f"{unit:<24}" + "".join(f"{n:>22}" for n in SHOWN) + "   speed-up")
        for name in arguments.methods:
            started = time.perf_counter()
            regrets[name] = replay(name, arguments.seeds, concurrency, arguments.jobs, arguments.by)
            seconds = time.perf_counter() - started
            print(describe(name, regrets[name], regrets.get(REFERENCE), seconds), flush=True)
        if arguments.out:
            write_curves(arguments.out.with_suffix(f".{concurrency}.csv"), regrets)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *TRANSFERS]
    )
    parser.add_argument("--by", choices=list(HEADS), default="compute")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="file for the curves: OUT.CONCURRENCY.csv")
    return parser.parse_args()


@functools.cache
def load() -> tuple[CurveTable, SearchSpace]:
    """Return the recorded trainings and the space that they are of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.yaml"
        path.write_text(SPACE)
        space = load_space(path)
    return load_curves(DATA, space.parameters), space


def replay(
    name: str, num_seeds: int, concurrency: int, jobs: int = 1, by: str = "compute"
) -> np.ndarray:
    """Return the regret at GRID, float[seeds, grid]; before the first report it is that of chance.

    A method that has to know its compute beforehand is told the REFERENCE_COMPUTE.

    Args:
        by: `compute` or `time`: whether a slot that waits costs nothing or as if it trained.
    """
    task = functools.partial(regret_curve, name, concurrency, by=by)
    if jobs == 1:
        return np.array([task(seed) for seed in range(num_seeds)])
    with multiprocessing.get_context("spawn").Pool(jobs, be_quiet) as pool:
        return np.array(pool.map(task, range(num_seeds), chunksize=5))


def be_quiet() -> None:
    """Let libraries of this process say no more than errors."""
    logging.disable(logging.WARNING)


def regret_curve(name: str, concurrency: int, seed: int, by: str = "compute") -> list[float]:
    """Return the regret of one search at GRID."""
    table, _ = load()
    trace = search(name, concurrency, seed)
    worst = float(table.values[:, -1].max() - 0.25)  # of guessing one of four letters
    samples = GRID * table.budget
    if by == "time":
        picked = [trace.picked(time=each) for each in samples / concurrency]
    else:
        picked = [trace.picked(spent=each) for each in samples]
    return [worst if row is None else table.regret(row) for row in picked]


def search(name: str, concurrency: int, seed: int) -> Trace:
    """Return what one search came to."""
    table, space = load()
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        limit = REFERENCE_COMPUTE * table.budget
        setting = Setting(table, space, seed, concurrency, limit, Path(folder))
        method = (METHODS | TRANSFERS)[name](setting)
        return simulate(table, method, concurrency, int(SHOWN[-1] * table.budget))


def memory_folder() -> str | None:
    """Return a folder without a disk behind it, if there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def describe(name: str, regrets: np.ndarray, reference: np.ndarray | None, seconds: float) -> str:
    """Return a method's line of the table."""
    places = [int(np.argmin(abs(GRID - shown))) for shown in SHOWN]
    cells = []
    for place in places:
        low, middle, high = np.percentile(regrets[:, place], [25, 50, 75])
        cells.append(f"{middle:.4f} ({low:.3f}-{high:.3f})")
    faster = "" if reference is None else f"{speed_up(regrets, reference):8.1f}x"
    return f"{name:<24}" + "".join(f"{cell:>22}" for cell in cells) + f" {faster}  {seconds:.0f} s"


def speed_up(regrets: np.ndarray, reference: np.ndarray) -> float:
    """Return how much less compute than the reference is needed for its regret at 8 trainings."""
    goal = np.median(reference[:, np.argmin(abs(GRID - REFERENCE_COMPUTE))])
    reached = np.median(regrets, axis=0) <= goal
    return float(REFERENCE_COMPUTE / GRID[np.argmax(reached)]) if reached.any() else 0.0


def write_curves(path: Path, regrets: dict[str, np.ndarray]) -> None:
    """Write the median regret of each method over compute."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["full_trainings", *regrets])
        medians: Sequence[np.ndarray] = [np.median(values, axis=0) for values in regrets.values()]
        for place, share in enumerate(GRID):
            writer.writerow([f"{share:.1f}", *(f"{float(m[place]):.6f}" for m in medians)])
    print(f"curves: {path}")


if __name__ == "__main__":
    main()
