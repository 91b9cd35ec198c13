"""How good a configuration each way of searching finds for its compute, on LCBench.

    python -m pip install -e '.[benchmarks]'
    python benchmarks/lcbench.py --data FOLDER --out runs.jsonl                # 17 tasks x 3 seeds
    python benchmarks/lcbench.py --data FOLDER --out runs.jsonl --slots 1 8 32 --noise
    python benchmarks/lcbench.py --data FOLDER --out runs.jsonl --training-seconds 60

Syne Tune needs an environment of its own (`syne_tune_server.py` says how to make it), named by
--peer-python; without it the other methods run.

FOLDER holds `model.onnx`, `encoding.json` and `config_space.json` of LCBench from
https://github.com/slds-lmu/yahpo_data: a surrogate of 7 hyperparameters, 52 epochs and 35 tasks.
Searchers and schedulers are those of real searches; a simulated clock trains their trials. Compute
is counted in full trainings. Regret is 0 for the best accuracy that is known of a task and 1 for
that of the median random configuration; it is of the configuration that would be picked then, at
full length and without noise. With --training-seconds the search's own work (measured, in seconds
of one processor) and the pauses of trials take time too, and compute is the time of all slots,
waiting or not.

What each run came to is added to --out, and a run that is there is not repeated, so a long table
can be made in pieces and by several calls one after another.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.lcbench_methods import METHODS, PEERS
from benchmarks.lcbench_runs import RULES, SHOWN, Job, Place, missing, read_results, run
from benchmarks.lcbench_surrogate import CHOOSE, FINAL
from benchmarks.lcbench_table import table
from benchmarks.replay import be_quiet
from benchmarks.syne_tune_client import SERVER

FILES = ("model.onnx", "encoding.json", "config_space.json")
CACHE = Path.home() / ".cache" / "nanovlm-lcbench"


def main() -> None:
    arguments = parse_arguments()
    jobs = {slots: make_jobs(arguments, slots) for slots in arguments.slots}
    if not arguments.table:
        place = Place(arguments.data, arguments.cache, arguments.peer_python)
        wanted = list(itertools.chain(*jobs.values()))
        run_missing(wanted, place, arguments.out, arguments.jobs)
    results = read_results(arguments.out)
    for slots, those in jobs.items():
        print(f"\n{describe(arguments, slots)}")
        print("\n".join(table(results, those, arguments.pick, arguments.against)))


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the surrogate")
    add("--out", type=Path, required=True, help="file of the single runs (JSON lines)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--against", choices=METHODS, metavar="METHOD", help="show paired differences to it")
    add("--tasks", nargs="+", default=["choose"], help="choose, final or ids")
    add("--seeds", type=int, default=3)
    add("--slots", type=int, nargs="+", default=[8], help="trials at once")
    add("--trainings", type=int, default=SHOWN[-1], choices=SHOWN, help="compute of a run")
    add("--noise", action="store_true", help="reports are accuracies on 1,500 questions")
    add("--training-seconds", type=float, help="of a full training; then all work takes time")
    add("--pick", choices=list(RULES), default="last", help="highest last value, or best at the "
        "furthest milestone that 3 trials have reached")  # fmt: skip
    add("--table", action="store_true", help="print the table of the file and run nothing")
    add("--jobs", type=int, default=1, help="processes")
    add("--cache", type=Path, default=CACHE, help="folder for what is known of the tasks")
    add("--peer-python", type=Path, help="interpreter of an environment with Syne Tune")
    arguments = parser.parse_args()
    arguments.tasks = find_tasks(parser, arguments.tasks)
    arguments.methods = find_methods(parser, arguments)
    absent = [name for name in FILES if not (arguments.data / name).is_file()]
    if absent:
        parser.error(f"--data: {arguments.data} must hold {', '.join(FILES)}; no {absent[0]} there")
    return arguments


def find_tasks(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[str]:
    """Return the ids that are meant, each once."""
    groups = {"choose": CHOOSE, "final": FINAL}
    tasks = list(dict.fromkeys(id for name in names for id in groups.get(name, (name,))))
    unknown = sorted(set(tasks) - {*CHOOSE, *FINAL})
    if unknown:
        known = ", ".join((*CHOOSE, *FINAL))
        parser.error(f"--tasks: must be choose, final or one of {known}; got {unknown[0]}")
    return tasks


def find_methods(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """Return the methods that are meant: if none is named, all that can run."""
    can_run = [name for name in METHODS if name not in PEERS or arguments.peer_python]
    methods: list[str] = arguments.methods or can_run
    lost = [name for name in methods if name not in can_run]
    if lost and not arguments.table:
        parser.error(f"--peer-python: must be given for {lost[0]}; see {SERVER.name}")
    return methods


def make_jobs(arguments: argparse.Namespace, slots: int) -> list[Job]:
    """Return the runs that a table needs, a seed of all tasks before the next."""
    return [
        Job(
            method=method,
            task=task,
            seed=seed,
            slots=slots,
            noise=arguments.noise,
            training_seconds=arguments.training_seconds,
            trainings=arguments.trainings,
        )
        for seed in range(arguments.seeds)
        for method in arguments.methods
        for task in arguments.tasks
    ]


def run_missing(jobs: Sequence[Job], place: Place, out: Path, num_processes: int) -> None:
    """Run what the file does not hold yet, and add it to the file."""
    wanted = list(missing(jobs, read_results(out)))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # of the processes that begin now
    with (
        out.open("a", encoding="utf-8") as file,
        multiprocessing.get_context("spawn").Pool(num_processes, be_quiet) as pool,
    ):
        done = pool.imap_unordered(functools.partial(run, place=place), wanted)
        for count, result in enumerate(done, start=1):
            file.write(result.to_line())
            file.flush()
            job = result.job
            print(
                f"{count}/{len(wanted)} {job.method}, task {job.task}, seed {job.seed}, "
                f"{job.slots} slots: {result.wall_seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )


def describe(arguments: argparse.Namespace, slots: int) -> str:
    """Return the title of a table."""
    shown = "accuracies on 1,500 questions" if arguments.noise else "exact accuracies"
    seconds = arguments.training_seconds
    costs = "" if seconds is None else f", {seconds:g} s a training, all work counted"
    return (
        f"{slots} slots, {len(arguments.tasks)} tasks x {arguments.seeds} seeds, {shown}{costs}; "
        f"picked: {arguments.pick}; by full trainings"
    )


if __name__ == "__main__":
    main()
