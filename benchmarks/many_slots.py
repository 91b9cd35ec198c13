"""What many slots ask of a search's driver: the real engine, with worker groups that train nothing.

    python benchmarks/many_slots.py                            # 256 slots, as fast as it goes
    python benchmarks/many_slots.py --load 200 --trials 5000   # 200 reports a second are offered
    python benchmarks/many_slots.py --tune --load 100                            # with Ray Tune

Everything is that of a search: Ray, the broker's actor, searcher, scheduler, recorder, store and
observers. Two things stand in for others:

- The worker groups are coroutines of one process. Each asks for jobs, reports at four milestones,
  waits for the decision and sends its progress once a second, as a real one does. A trial that goes
  on after a pause repeats its reports at once.
- `without_tune` stands in for Ray Tune, unless --tune is given: it calls the searcher and the
  scheduler as Tune's controller does. Left out: the threads of the trials, Tune's own lists of
  trials and their state on disk.

The time to a decision is that of the group's call, from the report handed in to the decision.
"""

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.fake_groups import ENDS, FakePool, Figures, fake_groups
from benchmarks.many_trials import check_complete
from nanovlm.cluster.relay import ending_of, result_of, trial_job
from nanovlm.cluster.worker_pool import WorkerPool
from nanovlm.config.space import load_space
from nanovlm.messages import Report, TrialRecord
from nanovlm.search.plan import SearchPlan
from nanovlm.search.run import run_plan
from nanovlm.search.searcher import RungScheduler, StudySearch
from nanovlm.search.stages import Search
from nanovlm.watch.observer import Observer

SPACE = """
preset: digits
search:
  lr_mp: {log_uniform: [1.0e-4, 3.0e-2]}
  lr_backbones: {log_uniform: [3.0e-5, 1.0e-2]}
  batch_size: {choice: [16, 32, 64]}
  weight_decay: default
scheduler: {name: asha, rungs: 4, reduction_factor: 3}
confirm: {top: 0}
resources: {cpus_per_worker: 0.001}
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "space.yaml"
        path.write_text(SPACE)
        changes = {"sampler.name": arguments.sampler, "budget.trials": arguments.trials}
        data = {"training": {"folder": ""}, "benchmark": {"folder": "", "samples": 1500}}
        plan = SearchPlan(load_space(path, changes), ENDS[:-1], ENDS[-1], data)
        meter = Meter(arguments.every)
        folder = Path(temporary) / "results"
        tune = contextlib.nullcontext()
        if not arguments.tune:
            tune = mock.patch.object(Search, "_tune", without_tune)  # type: ignore[assignment]
        with tune:
            run_plan(
                plan,
                folder,
                concurrency=arguments.slots,
                observers=[meter],
                start_workers=fake_groups(arguments.load, meter.pools),
            )
        check_complete(folder, arguments.trials)
        meter.print_figures()
        print_files(folder)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--load", type=float, help="reports a second that are offered in all")
    parser.add_argument("--tune", action="store_true", help="with Ray Tune")
    parser.add_argument("--every", type=int, default=1000, help="reports between two figures")
    return parser.parse_args()


# ---------------------------------------------------------------------- in place of Ray Tune


def without_tune(
    search: Search, pool: WorkerPool, searcher: StudySearch, scheduler: RungScheduler
) -> None:
    """Do what `Search._tune` does, with the broker's client called from here."""
    TuneLoop(search, pool, searcher, scheduler).run()


class TuneLoop:
    """Asks searcher and scheduler in the order of Tune's `TuneController.step`: free slots are
    filled first, then one event is handled."""

    def __init__(
        self, search: Search, pool: WorkerPool, searcher: StudySearch, scheduler: RungScheduler
    ) -> None:
        self._search, self._client, self._slots = search, pool.client, pool.concurrency
        self._searcher, self._scheduler = searcher, scheduler
        self._running: dict[str, Any] = {}  # by the id of the trial
        self._legs = itertools.count()
        self._is_finished = False

    def run(self) -> None:
        while not self._search._switch.is_thrown():
            self._fill_slots()
            if self._is_finished and not self._running:
                return
            running = list(self._running)
            random.shuffle(running)  # the first of them that has a report is taken
            found = self._client.next_of(running, timeout_seconds=0.1)
            if found is not None:
                self._take(self._running.pop(found[0]), found[1])

    def _fill_slots(self) -> None:
        while not self._is_finished and len(self._running) < self._slots:
            trial_id = str(next(self._legs))
            config: Any = self._searcher.suggest(trial_id)
            self._is_finished = config == StudySearch.FINISHED
            if self._is_finished or config is None:
                return
            trial = SimpleNamespace(trial_id=trial_id, config=config)
            self._scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]  # not looked at
            job = trial_job(
                self._search.plan.space,
                self._search.plan.milestones,
                self._search.folder,
                **config,
            )
            trial.job_id = job.trial_id
            self._client.submit(job)
            self._running[job.trial_id] = trial

    def _take(self, trial: Any, answer: Any) -> None:
        space = self._search.plan.space
        tell = result_of if isinstance(answer, Report) else ending_of
        result = tell(space, answer)
        tune: Any = None
        is_over = result["done"] or self._scheduler.on_trial_result(tune, trial, result) == "STOP"
        if not is_over:
            self._searcher.on_trial_result(trial.trial_id, result)
            self._running[trial.job_id] = trial
            return
        self._scheduler.on_trial_complete(tune, trial, result)
        self._searcher.on_trial_complete(trial.trial_id, result)


# ---------------------------------------------------------------------- what it takes


@dataclass(frozen=True)
class Snapshot:
    """What there is after some of the trials."""

    at: float
    """Seconds, on a clock that only goes forward."""
    num_trials: int
    """That have reported."""
    num_ended: int
    num_reports: int
    num_updates: int
    to_decision: list[float]
    """Seconds, of the reports since the last snapshot."""
    cpu_seconds: Mapping[str, float]
    """By kind of process."""
    mib: Mapping[str, float]
    """Resident memory, likewise."""
    num_processes: Mapping[str, int]


class Meter(Observer):
    """Takes a snapshot whenever the driver has recorded so many reports more."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._reports: dict[str, int] = {}  # recorded, by trial
        self._num_reports = self._num_ended = 0
        self.pools: list[FakePool] = []
        self.snapshots: list[Snapshot] = []

    def trial_changed(self, record: TrialRecord) -> None:
        self._num_ended += record.end is not None
        if len(record.reports) == self._reports.get(record.trial_id, 0):
            return
        self._reports[record.trial_id] = len(record.reports)
        self._num_reports += 1
        if self._num_reports % self._every == 1:
            self.snapshots.append(self._snapshot())

    def _snapshot(self) -> Snapshot:
        seen: Figures = ray.get(self.pools[-1].actor.figures.remote())
        cpu_seconds, mib, number = Counter[str](), Counter[str](), Counter[str]()
        itself = psutil.Process()
        for process in [itself, *itself.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                kind = "driver" if process == itself else kind_of(process)
                times = process.cpu_times()
                cpu_seconds[kind] += times.user + times.system
                mib[kind] += process.memory_info().rss / 2**20
                number[kind] += 1
        return Snapshot(
            time.monotonic(), len(self._reports), self._num_ended, seen.num_reports,
            seen.num_updates, seen.to_decision, cpu_seconds, mib, number,
        )  # fmt: skip

    def print_figures(self) -> None:
        """Print a line for each stretch between two snapshots, and the processes at the end."""
        print(
            "trials  ended  reports/s updates/s | to decision, ms: median p95 p99 | "
            "CPU ms a report: driver broker | MiB: driver broker"
        )
        for before, after in itertools.pairwise(self.snapshots):
            print_stretch(before, after)
        first, last = self.snapshots[0], self.snapshots[-1]
        print("all of them:")
        everything = [seconds for each in self.snapshots[1:] for seconds in each.to_decision]
        print_stretch(first, replace(last, to_decision=everything))
        reports = last.num_reports - first.num_reports
        for kind in sorted(last.num_processes):
            most = max(self.snapshots, key=lambda each: each.num_processes.get(kind, 0))
            used = last.cpu_seconds[kind] - first.cpu_seconds.get(kind, 0.0)
            number, share = most.num_processes[kind], used / (last.at - first.at)
            print(
                f"  {kind:<8} {number:3} processes: {100 * share:5.1f} % of a core, "
                f"{1000 * used / reports:6.2f} ms a report, {most.mib[kind] / number:.0f} MiB each"
            )


def print_stretch(before: Snapshot, after: Snapshot) -> None:
    seconds, reports = after.at - before.at, after.num_reports - before.num_reports
    ordered = sorted(after.to_decision)
    if not ordered:
        return  # the last trials have no decision to wait for
    at = [1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99)]
    cpu = [
        1000 * (after.cpu_seconds[kind] - before.cpu_seconds[kind]) / reports
        for kind in ("driver", "broker")
    ]
    print(
        f"{after.num_trials:6} {after.num_ended:6} {reports / seconds:10.1f} "
        f"{(after.num_updates - before.num_updates) / seconds:9.1f} | "
        f"{at[0]:23.1f} {at[1]:5.1f} {at[2]:5.1f} | {cpu[0]:16.2f} {cpu[1]:8.2f} | "
        f"{after.mib['driver']:6.0f} {after.mib['broker']:6.0f}"
    )


_KINDS = {
    "ray::Broker": "broker",
    "ray::FakeGroups": "groups",
    "ray::IDLE": "idle",
    "Agent": "agents",
    "ray::": "other actors",
    "raylet": "raylet",
    "gcs_server": "gcs",
}


def kind_of(process: psutil.Process) -> str:
    command = process.cmdline()
    if any("page_process" in part for part in command):
        return "pages"
    command = " ".join(command[:1])
    return next((kind for text, kind in _KINDS.items() if text in command), "other")


def print_files(folder: Path) -> None:
    """Print the size of what the folder holds."""
    for path in sorted(folder.iterdir()):
        parts = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in parts)
        print(f"  {path.name}: {size / 2**20:.2f} MiB in {len(parts)} files")


if __name__ == "__main__":
    main()
