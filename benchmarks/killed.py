"""A search that is killed again and again comes to what an undisturbed one comes to.

    python benchmarks/killed.py                   # 20 kills, about ten minutes on two cores
    python benchmarks/killed.py --kills 3 --trials 6

Runs `run_search.py` undisturbed with one slot, then once more, killed (SIGKILL to the program
alone) at random moments and resumed each time. Compares the trials, what Optuna was told of each,
the verdicts at the milestones and the runs that confirm, and looks whether every trial went on from
its last report.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

REPOSITORY = Path(__file__).parents[1]
SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1, lr_mp: 1.0e-3, lr_backbones: 1.0e-3}
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  lr_backbones: {log_uniform: [1.0e-4, 1.0e-1]}
  batch_size: {choice: [16, 32]}
scheduler: {rungs: 3, reduction_factor: 3}
confirm: {top: 1, seeds: 1}
"""
MOST_SECONDS = 600
DONE = 0
STARTING_SHARE = 0.2
"""Of the kills: while Ray starts, before any trial."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    problems = compare(folder, arguments.kills, arguments.trials, arguments.seed)
    if problems:
        print(f"look at {folder}")
    else:
        shutil.rmtree(folder)
    print("\n".join(problems) or "the same search, each trial told once")
    sys.exit(bool(problems))


def compare(folder: Path, num_kills: int, num_trials: int, seed: int) -> list[str]:
    """Run both searches in `folder` and return in what they differ."""
    (folder / "space.yaml").write_text(SPACE)
    started = time.monotonic()
    run(folder, "whole", num_trials, moment=None)
    seconds = time.monotonic() - started
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    moments, kills, code = random.Random(seed), 0, -1
    while code != DONE:
        is_starting = moments.random() < STARTING_SHARE
        wait = moments.uniform(0.0, 10.0 if is_starting else 1.5 * seconds / (num_kills + 1))
        moment = None if kills == num_kills else Moment(wait, is_starting)
        code = run(folder, "parts", num_trials, moment)
        kills += code != DONE
        done = count_lines(folder / "results" / "parts" / "trials.jsonl")
        print(f"kill {kills}, {moment}: {done} trials have ended", flush=True)
    whole, parts = (outcome(folder / "results" / name) for name in ("whole", "parts"))
    behind = starts_behind(folder / "results" / "parts")
    problems = [f"began before the last report: {', '.join(behind)}"] if behind else []
    problems += [f"{key} differs" for key in whole if whole[key] != parts[key]]
    return [*problems, *(["it was not killed"] if kills < num_kills else [])]


@dataclass(frozen=True)
class Moment:
    """When a program is killed."""

    seconds: float
    is_starting: bool
    """Whether they count from its start, or from the moment when its workers are at work."""

    def wait(self, process: "subprocess.Popen[bytes]", logs: Path) -> None:
        """Return at the moment, or when the program has ended."""
        before = log_sizes(logs)
        while not self.is_starting and process.poll() is None and log_sizes(logs) == before:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.seconds)


def log_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the workers' logs."""
    return {path.name: path.stat().st_size for path in folder.glob("*-rank-0.log")}


def run(folder: Path, name: str, num_trials: int, moment: Moment | None) -> int:
    """Start or resume a search; return its exit code, or -9 if it was killed."""
    exists = (folder / "results" / name / "space.yaml").exists()
    command = [
        *(sys.executable, str(REPOSITORY / "run_search.py"), "--space", "space.yaml"),
        *("--name", name, "--concurrency", "1", "--trials", str(num_trials)),
        *(["--resume"] if exists else []),
    ]
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        if moment is None:
            return process.wait(MOST_SECONDS)
        moment.wait(process, folder / "results" / name / "logs")
        if process.poll() is not None:
            return process.returncode
        kill(process)
    if not exists and not (folder / "results" / name / "space.yaml").exists():
        shutil.rmtree(folder / "results" / name, ignore_errors=True)  # nothing has begun
    return -signal.SIGKILL


def kill(process: "subprocess.Popen[Any]") -> None:
    """Kill the program alone; what it started is to end by itself, and is ended if it does not."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=20)


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that has to be the same, without times."""
    trials = read_lines(folder / "trials.jsonl")
    verdicts = read_lines(folder / "rungs.jsonl")
    keys = ("parameters", "state", "reason", "metrics")
    return {
        "the number of lines in trials.jsonl": len(trials),
        "the trials": {t["number"]: [t[key] for key in keys] for t in trials},
        "the verdicts": sorted(verdicts, key=lambda v: (v["number"], v["milestone"])),
        "what Optuna was told": told(folder),
        "the runs that confirm": {
            t["trial_id"]: t["metrics"] for t in read_lines(folder / "confirm.jsonl")
        },
    }


def told(folder: Path) -> dict[int, Any]:
    """Return each trial of Optuna's by its number here; fails if a number stands twice."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    trials = optuna.load_study(study_name="search", storage=storage).trials
    whole = [trial for trial in trials if "number" in trial.user_attrs]
    counts = Counter(trial.user_attrs["number"] for trial in whole)
    assert set(counts.values()) == {1}, f"told twice: {counts}"
    ends = (
        line for line in read_lines(folder / "study.journal") if line.get("state", 0) not in (0, 4)
    )
    tellings = Counter(line["trial_id"] for line in ends if "trial_id" in line)
    assert set(tellings.values()) <= {1}, f"told twice: {tellings}"
    return {
        trial.user_attrs["number"]: (trial.state.name, trial.value, trial.intermediate_values)
        for trial in whole
    }


def starts_behind(folder: Path) -> list[str]:
    """Return the trials that began again before their last report, by the workers' logs.

    So that at most what was trained since a report is trained twice. Final reports do not count:
    they are lost if the program is killed before it has written the trial's line, which happens
    since workers live a second or two longer than the program.
    """
    full = min(t["samples_seen"] for t in read_lines(folder / "trials.jsonl") if is_full(t))
    reported: dict[str, int] = {}
    behind, starting = [], ""
    for path in sorted((folder / "logs").glob("*-rank-0.log")):
        for line in path.read_text().splitlines():
            if match := re.search(r"trial (\S+) starts", line):
                starting = match[1]
            elif match := re.search(r"trial (\S+) goes on after (\d+) samples", line):
                starting = ""
                if int(match[2]) < reported.get(match[1], 0):
                    behind.append(f"{match[1]} at {match[2]}")
            elif match := re.search(r"trial (\S+) reports at (\d+) samples", line):
                if match[1] == starting and match[1] in reported:
                    behind.append(f"{match[1]} at 0")
                starting = ""
                if int(match[2]) < full:
                    reported[match[1]] = max(reported.get(match[1], 0), int(match[2]))
    return behind


def is_full(trial: dict[str, Any]) -> bool:
    return bool(trial["state"] == "completed")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_lines(path: Path) -> int:
    return len(read_lines(path))


if __name__ == "__main__":
    main()
