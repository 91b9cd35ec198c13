"""What a search costs its driver: thousands of trials that train nothing, in simulated time.

    python benchmarks/many_trials.py                    # 5,000 trials, 64 at once
    python benchmarks/many_trials.py --trials 200 --slots 8

The searcher, the scheduler and the results store are those of a search; trials report at four
milestones, wait there, and go on as the rungs decide. No Ray: what Tune does is not in the times.
The time of a report is all that the driver does on its account: telling the searcher and the
scheduler and, where the trial ends, its line on disk, the summary and the next suggestion.
"""

import argparse
import collections
import gc
import heapq
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.cluster.relay import IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.search_settings import Objective
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import End, Leg, Report, TrialRecord
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.read import RUNGS_FILE, read_records
from nanovlm.results.write import ResultsStore
from nanovlm.search.searcher import Pauses, RungScheduler, StudySearch

METRIC = "mmstar_accuracy"
SPACE = """
preset: digits
search:
  lr_mp: {log_uniform: [1.0e-4, 3.0e-2]}
  lr_backbones: {log_uniform: [3.0e-5, 1.0e-2]}
  batch_size: {choice: [16, 32, 64]}
  weight_decay: default
scheduler: {name: asha, rungs: 4, reduction_factor: 3}
"""
ENDS = (1000, 3000, 9000, 27000)
PARTS = ("suggest", "report", "tell", "scheduler", "store")
WINDOW = 500


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "space.yaml"
        path.write_text(SPACE)
        space = load_space(path, {"sampler.name": arguments.sampler})
        driver = Driver(space, Path(temporary) / "results", arguments.slots)
        with driver.store.opened(resume=False):
            driver.store.begin()
            driver.run(arguments.trials)
            driver.store.close(0.0, "done")
        check_complete(driver.store.folder, arguments.trials)
    driver.print_times(arguments.trials)
    print_memory(driver)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sampler", default="auto")
    return parser.parse_args()


class Driver:
    """Does what the driver of a search does, with trials that report made-up values."""

    def __init__(self, space: SearchSpace, folder: Path, slots: int) -> None:
        self.space = space
        self.slots, self.num_trials = slots, 0
        self.trials: dict[int, Any] = {}  # by number
        self.store = ResultsStore(folder, Objective(metric=METRIC, mode="max"), 0.0)
        self.seconds: list[dict[str, float]] = []
        """Of each report, in PARTS."""
        self.trial_of_report: list[int] = []
        """How many trials had begun before each report."""
        self.rss: dict[int, float] = {}
        """MiB, by ended trials."""
        self._clock: dict[str, float] = {}

    def run(self, num_trials: int) -> None:
        """Run `num_trials` trials to their end."""
        self.num_trials = num_trials
        rungs = build_rungs(self.space, ENDS[:-1], self.store.folder / RUNGS_FILE)
        assert isinstance(rungs, PausingHalving)
        self.searcher = StudySearch(
            self.space,
            self.store.folder,
            self.slots,
            StopSwitch(),
            ENDS[:-1],
            most_trials=num_trials,
            pauses=Pauses(rungs, self._end_waiting),
        )
        self.scheduler = RungScheduler(rungs)
        self._random = random.Random(0)
        self._under_way: list[tuple[float, int, int, Any]] = []
        self._legs = itertools.count()
        for _ in range(min(self.slots, num_trials)):
            self._begin(0.0)
        while self._under_way:
            now, _, rung, trial = heapq.heappop(self._under_way)
            self._clock = dict.fromkeys(PARTS, 0.0)
            self.trial_of_report.append(len(self.trials))
            if self._report(trial, rung):
                self._wait(now, rung + 1, trial)
            else:
                self._begin(now)
            self.seconds.append(self._clock)

    def _begin(self, now: float) -> None:
        """Let a free slot take the next trial, if there is one."""
        leg = str(next(self._legs))
        with self._timed("suggest"):
            config: Any = self.searcher.suggest(leg)
        if not isinstance(config, dict):
            return  # nothing to run now
        number = config[NUMBER]
        if number not in self.trials:
            quality = self._random.random()
            self.trials[number] = SimpleNamespace(config=config, reports=[], quality=quality)
            if number + 1 in (WINDOW, self.num_trials // 2, self.num_trials):
                self.rss[number + 1] = resident_mib()
        trial = self.trials[number]
        trial.trial_id = leg
        with self._timed("scheduler"):
            self.scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]  # not looked at
        self._wait(now, len(trial.reports), trial)

    def _end_waiting(self, decision: PruningDecision) -> None:
        """Write down that a trial which waited will not go on."""
        if not decision.goes_on:
            self._end(self.trials[decision.number], is_final=False)

    def _wait(self, now: float, rung: int, trial: Any) -> None:
        samples = ENDS[rung] - (ENDS[rung - 1] if rung else 0)
        pace = 1 + 0.2 * self._random.random()
        number = trial.config[NUMBER]
        heapq.heappush(self._under_way, (now + samples * pace, number, rung, trial))

    def _report(self, trial: Any, rung: int) -> bool:
        """Hand in a report; return whether the trial goes on."""
        value = 0.9 * trial.quality + 0.1 * self._random.random()
        is_final = rung == len(ENDS) - 1
        metrics = {METRIC: value, "mmstar_num_items": 1500.0, "train_loss": 1.0}
        trial.reports.append(
            Report(samples_seen=ENDS[rung], step=1, metrics=metrics, seconds=1.0, is_final=is_final)
        )
        result = {METRIC: value, SAMPLES_SEEN: ENDS[rung], IS_FINAL: is_final}
        goes_on = not is_final
        if goes_on:
            with self._timed("scheduler"):
                decision = self.scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]
            goes_on = decision == "CONTINUE"
        if goes_on:
            with self._timed("report"):
                self.searcher.on_trial_result(trial.trial_id, result)
            return True
        with self._timed("scheduler"):
            self.scheduler.on_trial_complete(None, trial, result)  # type: ignore[arg-type]
        with self._timed("tell"):
            self.searcher.on_trial_complete(trial.trial_id, result)
        if is_final:
            self._end(trial, is_final=True)
        else:
            with self._timed("store"):
                self.store.take(replace(self._record(trial, None), is_paused=True))
        return False

    def _end(self, trial: Any, is_final: bool) -> None:
        record = self._record(trial, End.COMPLETED if is_final else End.PRUNED)
        with self._timed("store"):
            self.store.take(record)
            self.store.write_summary(0.0)

    def _record(self, trial: Any, end: End | None) -> TrialRecord:
        number = trial.config[NUMBER]
        return TrialRecord(
            trial_id=f"trial-{number:04d}",
            number=number,
            parameters=trial.config[VALUES],
            config=config_values(self.space.config_for(trial.config[VALUES])),
            end=end,
            reports=tuple(trial.reports),
            submitted_at=0.0,
            first_step_at=float(number),
            ended_at=number + 0.5,
            worker_group=f"group-{number % self.slots}",
            legs=(
                Leg(
                    worker_group=f"group-{number % self.slots}",
                    first_step_at=float(number),
                    ended_at=number + 0.5,
                ),
            ),
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._clock[part] = self._clock.get(part, 0.0) + time.perf_counter() - started

    def print_times(self, num_trials: int) -> None:
        """Print milliseconds per report at both ends of the search."""
        print(f"{num_trials} trials, {len(self.seconds)} reports, {self.slots} slots")
        begin = [s for s, n in zip(self.seconds, self.trial_of_report, strict=True) if n < WINDOW]
        last = num_trials - WINDOW
        end = [s for s, n in zip(self.seconds, self.trial_of_report, strict=True) if n >= last]
        for name, window in (("first", begin), ("last", end)):
            print(f"{name} {min(WINDOW, num_trials)} trials, ms (median of the calls, p95, share):")
            total = [sum(s.values()) for s in window]
            print_line("a report", total, sum(total))
            for part in PARTS:
                print_line(part, [s[part] for s in window if s[part] > 0], sum(total))


def print_line(name: str, seconds: Sequence[float], total: float) -> None:
    if seconds:
        p95 = sorted(seconds)[round(0.95 * (len(seconds) - 1))]
        print(
            f"  {name:<10} {1000 * statistics.median(seconds):8.2f} {1000 * p95:8.2f} "
            f"{100 * sum(seconds) / total:5.1f} %  {len(seconds)} times"
        )


def print_memory(driver: Driver) -> None:
    """Print the resident memory on the way, and what the objects are at the end."""
    for ended, mib in sorted(driver.rss.items()):
        print(f"RSS after {ended} trials: {mib:.0f} MiB")
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for thing in gc.get_objects():
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        counts[name] += 1
        sizes[name] += sys.getsizeof(thing)
    for name, size in sizes.most_common(8):
        print(f"  {size / 2**20:6.1f} MiB in {counts[name]:7} {name}")


def resident_mib() -> float:
    """Return the memory that this process occupies now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def check_complete(folder: Path, num_trials: int) -> None:
    """Assert that trials.jsonl has every trial once."""
    numbers = [record.number for record in read_records(folder)]
    assert sorted(numbers) == list(range(num_trials)), f"{len(numbers)} lines in trials.jsonl"


if __name__ == "__main__":
    main()
