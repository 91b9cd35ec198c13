"""The start of worker groups: Ray's TorchTrainer as it is, against the trainer of this project.

    python benchmarks/group_start.py                  # two groups, three times; about 2 minutes
    python benchmarks/group_start.py --groups 4 --times 5 --out starts.json

Both sides run the same training function, which says that it has begun and waits, under the
settings of Ray that a search has. Counted from the call of `fit` until all have begun: the time,
the CPU time of all processes, and the memory that the processes which started besides the workers
share with nobody. What a run starts once, such as the actor that keeps Ray's records, comes before.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.cluster.broker import opened_broker
from nanovlm.cluster.group_trainer import GroupTrainer
from nanovlm.cluster.ray_cluster import connect
from nanovlm.cluster.ray_compat import start_run_records
from nanovlm.files import replace_json

WORKER = "ray::RayTrainWorker"
MIB = 2**20
SIDES = ("TorchTrainer", "GroupTrainer")
SECONDS_TO_SETTLE = 5.0
"""Until what a run starts once is there."""

MakeTrainer = Callable[[str, Path], Any]


def begin(file: str) -> None:
    """Say that the worker has begun, and work until it is killed."""
    Path(file).touch()
    time.sleep(3600)


def options(name: str, folder: Path, groups: int) -> dict[str, Any]:
    cpus = ray.cluster_resources()["CPU"] / groups
    return {
        "train_loop_per_worker": lambda: begin(f"{folder}/{name}.begun"),
        "scaling_config": ScalingConfig(resources_per_worker={"CPU": cpus}),
        "run_config": RunConfig(
            name=name, storage_path=str(folder), failure_config=FailureConfig(max_failures=0)
        ),
    }


def processes() -> dict[int, psutil.Process]:
    """Return this process and those that it has started."""
    here = psutil.Process()
    return {each.pid: each for each in (here, *here.children(recursive=True))}


def cpu_seconds(of: dict[int, psutil.Process]) -> dict[int, float]:
    found = {}
    for pid, process in of.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[pid] = times.user + times.system
    return found


def start(make: MakeTrainer, groups: int, folder: Path) -> dict[str, float]:
    """Return what the start of so many groups takes; they are left at work."""
    trainers = [make(f"group-{number}", folder) for number in range(groups)]
    before = cpu_seconds(processes())
    began_at = time.perf_counter()
    for trainer in trainers:
        threading.Thread(target=trainer.fit, daemon=True).start()
    while len(list(folder.glob("*.begun"))) < groups:
        time.sleep(0.01)
    seconds = time.perf_counter() - began_at
    now = processes()
    after = cpu_seconds(now)
    new = [process for pid, process in now.items() if pid not in before]
    besides = [process for process in new if not process.name().startswith(WORKER)]
    return {
        "seconds": seconds,
        "CPU seconds": sum(used - before.get(pid, 0.0) for pid, used in after.items()),
        "processes besides": len(besides),
        "their MiB": sum(each.memory_full_info().uss for each in besides) / MIB,
    }


def measure(side: str, groups: int) -> None:
    """Print the figures of one side as JSON, and end at once with all that was started."""
    with tempfile.TemporaryDirectory() as name, connect(None), opened_broker("start") as broker:
        start_run_records()

        def make(name: str, folder: Path) -> Any:
            if side == "TorchTrainer":
                return TorchTrainer(**options(name, folder, groups))
            return GroupTrainer(
                owner=broker, on_failure=lambda _: None, **options(name, folder, groups)
            )

        time.sleep(SECONDS_TO_SETTLE)
        print(json.dumps(start(make, groups, Path(name))), flush=True)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(0)  # trainers cannot be ended in order while they start


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--side", choices=SIDES, help="measure this one alone, once")
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.groups)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.times):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--groups", str(args.groups)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                side, {key: round(value, 2) for key, value in found[side][-1].items()}, flush=True
            )
    for side, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"{side}, medians of {args.times}, {args.groups} groups:")
        print("  " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))
    if args.out:
        replace_json(args.out, {"groups": args.groups, "runs": found})


if __name__ == "__main__":
    main()
