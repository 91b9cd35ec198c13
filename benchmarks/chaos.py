"""A search on a cluster that loses parts of itself all the time comes to the same trials.

    python benchmarks/chaos.py                                # one run, some minutes on two cores
    python benchmarks/chaos.py --runs 20 --out chaos.json
    python benchmarks/chaos.py --seed 7 --faults worker,node,add

Runs `run_search.py` undisturbed with one slot, then on a cluster of a head and four nodes of one
CPU each (raylets on this machine, `tests/raylets.py`), with the study in a real PostgreSQL. Every
`--interval` seconds one of these happens, drawn from the seed:

    worker     a worker is killed (SIGKILL)
    stop       a worker stops answering (SIGSTOP)
    node       a node is lost for good, with all that runs on it; one is always left
    add        a node is added, up to four
    database   PostgreSQL is stopped at once and starts again
    driver     the program is killed (SIGKILL) and resumed

Says what was done, and then every rule that does not hold: each trial has ended, once, in the
results folder and in the study; it has the configuration that it has in the undisturbed search and
the same metrics to the last bit; it went on from its last report; no node was idle for more than
`--idle` seconds while there was work; the program ended by itself and left nothing on the cluster.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.chaos_checks import IdleMeter, has_begun_a_trial, logged, problems_of
from benchmarks.chaos_faults import FAULTS, MOST_NODES, Faults, Program, parts_left
from benchmarks.command_line import parser_of
from nanovlm.cluster.stalls import LEAST_START_SECONDS
from nanovlm.files import replace_json
from tests.postgres import Database, started_database
from tests.processes import wait_until
from tests.raylets import Raylets

SPACE = """
preset: digits
base: {{data_cutoff_idx: 300, epochs: 1, lr_mp: 1.0e-3, lr_backbones: 1.0e-3, log_wandb: false}}
search:
  lr_mp: {{log_uniform: [1.0e-4, 1.0e-2]}}
  lr_backbones: {{log_uniform: [1.0e-4, 1.0e-2]}}
  batch_size: {{choice: [16, 32]}}
sampler: {{name: random, seed: 0}}
scheduler: {{rungs: 3, reduction_factor: 3}}
budget: {{trials: {trials}}}
confirm: {{top: 0}}
resources: {{stall_minutes: {stall_minutes}}}
study: {study}
"""
STALL_SECONDS = 15.0
_CHECK_SECONDS = 2.0  # between the search's own looks for stalled groups
MOST_SECONDS = 900.0
"""A disturbed search that takes longer hangs."""
_MOST_ENDS = 3
"""The program is resumed so often after it has ended by itself, which it must not."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; then the next ones")
    parser.add_argument("--faults", default=",".join(FAULTS), help="kinds, with commas")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between faults")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds that a node may be idle")
    parser.add_argument("--folder", type=Path, help="keeps all files, and the undisturbed search")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    kinds = arguments.faults.split(",")
    if unknown := set(kinds) - FAULTS.keys():
        parser.error(f"--faults: must be of {', '.join(FAULTS)}, got {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the nodes and the database end with it
    os.environ["OMP_NUM_THREADS"] = "1"  # results repeat to the bit for an equal number of threads
    runs: list[dict[str, Any]] = []
    with _working_folder(arguments.folder) as folder:
        whole = undisturbed(folder, arguments.trials)
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            print(f"run with --seed {seed}", flush=True)
            place = folder / f"seed-{seed}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            runs.append(
                disturbed(
                    place, whole, arguments.trials, kinds, seed, arguments.interval, arguments.idle
                )
            )
            if arguments.out:
                replace_json(arguments.out, {"runs": runs})
    clean = sum(not run["problems"] for run in runs)
    print(f"{clean} of {len(runs)} runs are clean")
    sys.exit(clean < len(runs))


@contextlib.contextmanager
def _working_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def write_space(folder: Path, num_trials: int, study: str) -> Path:
    path = folder / "space.yaml"
    minutes = STALL_SECONDS / 60
    path.write_text(SPACE.format(trials=num_trials, stall_minutes=minutes, study=study))
    return path


def undisturbed(folder: Path, num_trials: int) -> Path:
    """Run the search with one slot and nothing that happens to it; return its results folder."""
    place = folder / f"undisturbed-{num_trials}"
    results = place / "results" / "whole"
    if (results / "summary.json").exists():
        return results
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    space = write_space(place, num_trials, "{}")
    started = time.monotonic()
    with Raylets() as cluster:
        cluster.add_node()
        program = Program(cluster, place, "whole", "--space", str(space), "--concurrency", "1")
        assert wait_until(lambda: program.code() is not None, MOST_SECONDS), "it hangs"
    assert program.code() == 0, program.output.read_text()
    print(f"undisturbed, one slot: {time.monotonic() - started:.0f} s", flush=True)
    return results


def disturbed(
    folder: Path,
    whole: Path,
    num_trials: int,
    kinds: Sequence[str],
    seed: int,
    interval: float,
    most_idle: float,
) -> dict[str, Any]:
    """Run the search once while faults happen; return what happened and which rules it broke."""
    with started_database() as database, Raylets() as cluster:
        for _ in range(MOST_NODES):
            cluster.add_node()
        study = f"{{storage: '{database.url}', name: chaos}}"
        space = write_space(folder, num_trials, study)
        program = Program(cluster, folder, "chaos", "--space", str(space))
        run = Run(cluster, database, program, seed, num_trials)
        try:
            run.disturb(kinds, interval)
            problems = [*run.problems, *_idle(run.meter, most_idle)]
            problems += problems_of(whole, program.results, database.url, num_trials)
        finally:
            program.kill()
            if run.problems:
                shutil.copytree(cluster.folder / "ray", folder / "ray", ignore=_sockets)
    for problem in problems:
        print(f"  WRONG: {problem}")
    longest = max(run.meter.longest.values(), default=0.0)
    print(
        f"  {'clean' if not problems else f'{len(problems)} problems'}: {len(run.done)} faults in "
        f"{run.seconds:.0f} s, longest idleness {longest:.0f} s, longest start of the program "
        f"{run.longest_start:.0f} s",
        flush=True,
    )
    return {
        "seed": seed,
        "seconds": round(run.seconds),
        "faults": run.done,
        "longest_start_seconds": round(run.longest_start, 1),
        "longest_idle_seconds": {key: round(s, 1) for key, s in run.meter.longest.items()},
        "problems": problems,
    }


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and "sock" in folder]


def _idle(meter: IdleMeter, most_seconds: float) -> Iterator[str]:
    for address, seconds in sorted(meter.longest.items()):
        if seconds > most_seconds:
            which = "all nodes were" if address == "all" else f"{address} was"
            yield f"{which} idle for {seconds:.0f} s"


class Run:
    """A search that is being disturbed."""

    def __init__(
        self, cluster: Raylets, database: Database, program: Program, seed: int, num_trials: int
    ) -> None:
        self._cluster = cluster
        self._program = program
        self._num_trials = num_trials
        self._faults = Faults(cluster, program, random.Random(seed), database)
        self.meter = IdleMeter(cluster)
        self.done: list[dict[str, Any]] = []
        """The faults: `at` seconds, `kind` and `what`."""
        self.problems: list[str] = []
        self.seconds = 0.0
        self.longest_start = 0.0
        """Seconds from a start of the program to its first trial."""
        self._began_at = 0.0
        self._num_lines = 0  # of the workers' logs, when the program began

    def disturb(self, kinds: Sequence[str], interval: float) -> None:
        """Let faults happen until the search is over; the first when a trial has begun."""
        started = time.monotonic()
        due = float("inf")
        while not self._is_over():
            self.seconds = time.monotonic() - started
            if self.seconds > MOST_SECONDS:
                self.problems.append(f"the search has not ended after {MOST_SECONDS:.0f} s")
                break
            if due == float("inf") and logged(self._program.results):
                due = self.seconds + interval
            if self.seconds >= due:
                self._disturb_once(kinds)
                due += interval
            self._look()
            time.sleep(1)
        self.seconds = time.monotonic() - started
        output = self._program.output.read_text()
        if "Traceback" in output:
            self.problems.append(f"the terminal shows a traceback; see {self._program.output}")
        if not wait_until(lambda: not parts_left(self._cluster), seconds=30):
            self.problems.append(f"left on the cluster: {', '.join(parts_left(self._cluster))}")

    def _disturb_once(self, kinds: Sequence[str]) -> None:
        kind, what = self._faults.next(kinds)
        num_begun = len({trial_id for trial_id, _, _ in logged(self._program.results)})
        print(f"  {self.seconds:4.0f} s, {num_begun} trials: {kind}, {what}", flush=True)
        self.done.append({"at": round(self.seconds, 1), "kind": kind, "what": what})
        if kind == "stop":  # until the search may take the worker for lost
            node, process = self._faults.stopped[-1]
            least = 0.0 if has_begun_a_trial(process) else LEAST_START_SECONDS
            self.meter.excuse(node, max(STALL_SECONDS, least) + _CHECK_SECONDS)

    def _is_over(self) -> bool:
        """Return whether the program has ended in order; one that has not is resumed."""
        code = self._program.code()
        if code in (None, 0):
            return code == 0
        last = self._program.output.read_text().splitlines()[-3:]
        self.problems.append(f"after {self.seconds:.0f} s the program ended with {code}: {last}")
        if len(self.problems) > _MOST_ENDS:
            return True
        self._program.start()
        return False

    def _look(self) -> None:
        lines = logged(self._program.results)
        if self._began_at != self._program.began_at:
            self._began_at, self._num_lines = self._program.began_at, len(lines)
        is_up = self._num_lines < len(lines)
        if not is_up:
            self.longest_start = max(self.longest_start, time.monotonic() - self._began_at)
        self._faults.is_up = is_up
        has_new_trials = len({trial_id for trial_id, _, _ in lines}) < self._num_trials
        self.meter.look(self._faults.workers(), is_up, has_new_trials)


if __name__ == "__main__":
    main()
