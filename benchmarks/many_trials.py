"""What a search costs its driver: thousands of trials that train nothing, in simulated time.

    python benchmarks/many_trials.py                    # 5,000 trials, 64 at once
    python benchmarks/many_trials.py --trials 200 --slots 8

The searcher, the scheduler and the results store are those of a search; trials report at four
milestones and go on as the scheduler decides. No Ray: what Tune does between is not in the times.
The time of a report is all that the driver does on its account: telling the searcher and the
scheduler and, where the trial ends, its line on disk, the summary and the next suggestion.
"""

import argparse
import collections
import gc
import heapq
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from nanovlm.config_files import config_values
from nanovlm.distributed.session import StopSwitch
from nanovlm.distributed.trainable import IS_FINAL, NUMBER, SAMPLES_SEEN, VALUES
from nanovlm.messages import End, Leg, Report, TrialRecord
from nanovlm.results.read import RUNGS_FILE, read_records
from nanovlm.results.store import ResultsStore
from nanovlm.search.rungs import build_rungs
from nanovlm.search.scheduler import RungScheduler
from nanovlm.search.searcher import build_searcher
from nanovlm.search.sections import Objective
from nanovlm.search.space import SearchSpace, load_space

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sampler", default="tpe")
    return parser.parse_args()


class Driver:
    """Does what the driver of a search does, with trials that report made-up values."""

    def __init__(self, space: SearchSpace, folder: Path, slots: int) -> None:
        self.space = space
        self.slots = slots
        self.store = ResultsStore(folder, Objective(metric="mmstar_accuracy", mode="max"), 0.0)
        self.seconds: list[dict[str, float]] = []
        """Of each report, in PARTS."""
        self.trial_of_report: list[int] = []
        """How many trials had ended before each report."""
        self.rss: dict[int, float] = {}
        """MiB, by ended trials."""
        self._clock: dict[str, float] = {}

    def run(self, num_trials: int) -> None:
        """Run `num_trials` trials to their end."""
        self.searcher = build_searcher(
            self.space, self.store.folder, self.slots, StopSwitch(), ENDS[:-1]
        )
        self.scheduler = RungScheduler(
            build_rungs(self.space, ENDS[:-1], self.store.folder / RUNGS_FILE), "mmstar_accuracy"
        )
        self._random = random.Random(0)
        self._under_way: list[tuple[float, int, int, Any]] = []
        begun = min(self.slots, num_trials)
        for number in range(begun):
            self._begin(number, 0.0)
        ended = 0
        while self._under_way:
            now, number, rung, trial = heapq.heappop(self._under_way)
            self._clock = dict.fromkeys(PARTS, 0.0)
            self.trial_of_report.append(ended)
            if not self._report(trial, rung):
                ended += 1
                if begun < num_trials:
                    self._begin(begun, now)
                    begun += 1
                if ended in (WINDOW, num_trials // 2, num_trials):
                    self.rss[ended] = resident_mib()
            else:
                self._wait(now, number, rung + 1, trial)
            self.seconds.append(self._clock)

    def _begin(self, number: int, now: float) -> None:
        with self._timed("suggest"):
            config = self.searcher.suggest(str(number))
        assert config is not None, "the study file can be written"
        trial: Any = SimpleNamespace(trial_id=str(number), config=config, reports=[])
        trial.quality = self._random.random()
        with self._timed("scheduler"):
            self.scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]  # not looked at
        self._wait(now, number, 0, trial)

    def _wait(self, now: float, number: int, rung: int, trial: Any) -> None:
        samples = ENDS[rung] - (ENDS[rung - 1] if rung else 0)
        pace = 1 + 0.2 * self._random.random()
        heapq.heappush(self._under_way, (now + samples * pace, number, rung, trial))

    def _report(self, trial: Any, rung: int) -> bool:
        """Hand in a report; return whether the trial goes on."""
        value = 0.9 * trial.quality + 0.1 * self._random.random()
        is_final = rung == len(ENDS) - 1
        metrics = {"mmstar_accuracy": value, "mmstar_num_items": 1500.0, "train_loss": 1.0}
        trial.reports.append(
            Report(samples_seen=ENDS[rung], step=1, metrics=metrics, seconds=1.0, is_final=is_final)
        )
        result = {"mmstar_accuracy": value, SAMPLES_SEEN: ENDS[rung], IS_FINAL: is_final}
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
        record = self._record(trial, is_final)
        with self._timed("store"):
            self.store.add(record)
            self.store.write_summary(0.0)
        return False

    def _record(self, trial: Any, is_final: bool) -> TrialRecord:
        number = trial.config[NUMBER]
        return TrialRecord(
            trial_id=f"trial-{number:04d}",
            number=number,
            parameters=trial.config[VALUES],
            config=config_values(self.space.config_for(trial.config[VALUES])),
            end=End.COMPLETED if is_final else End.PRUNED,
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
