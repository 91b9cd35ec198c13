"""A whole search through Ray on data in the hub's formats, and what its trials left on the GPU.

    python benchmarks/whole_search.py                                 # a tiny model, on the CPU
    python benchmarks/whole_search.py --config 222m --gpus 1 --halve  # one trial at a time
    python benchmarks/whole_search.py --config 222m --gpus 0.5        # two share a GPU

Everything is as in `run_search.py` but for the data, which are pictures made here, and the weights,
which are random. Printed are the turnaround between trials, the memory before and after each trial,
and for how long trials ran beside each other. With `--halve` the last trial gets `MEMORY_SHARE` of
the GPU memory that the trial before it took, so that its batch does not fit: it has to go on with
smaller micro-batches, or the benchmark fails. With `--break` a kernel of the second trial fails,
which spoils the GPU for its process: the trial has to go on in another one.
"""

import argparse
import dataclasses
import functools
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import psutil
import torch
import yaml
from ray._private.accelerators import NvidiaGPUAcceleratorManager

from benchmarks.command_line import parser_of
from benchmarks.figures import Figures
from nanovlm.cluster.worker_groups import worker_groups
from nanovlm.config.schema import VLMConfig
from nanovlm.config.space import load_space
from nanovlm.messages import Job, Report, TrialRecord
from nanovlm.resources import Resources
from nanovlm.results.read import LOGS_DIR
from nanovlm.results.summary import turnarounds
from nanovlm.search.plan import plan_search
from nanovlm.search.run import run_plan
from nanovlm.training.meter import OnUpdate, ignore
from nanovlm.trial import run_trial
from nanovlm.watch.observer import Observer, RunStart
from tests import hub_data

MEMORY_SHARE = 0.7
MAX_GROWTH_GB = 0.05
"""Of a worker's tensors on the GPU, from the end of its first trial to that of another."""
HALVED = "out of GPU memory with micro_batch_size"
"""How a worker's note on it begins."""
NUM_LOG_LINES = 40


@dataclasses.dataclass(frozen=True)
class Setup:
    """How large the search is."""

    vlm: VLMConfig
    batch_size: int
    rows: int
    """Of each of the three sub-sets; most have two or three samples."""
    questions_per_axis: int


SETUPS = {
    "tiny": Setup(hub_data.VLM, batch_size=8, rows=24, questions_per_axis=1),
    "222m": Setup(VLMConfig(), batch_size=128, rows=240, questions_per_axis=10),
}


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    if arguments.gpus:
        tell_ray_of_gpus()
    figures = Figures(arguments.json, gpus_per_worker=arguments.gpus)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        space = write_space(folder, arguments)
        figures.add(data_seconds=time.perf_counter() - started)
        try:
            search(space, folder, arguments, figures)
        finally:
            print_worker_logs(folder / "results" / LOGS_DIR)
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    wrong = complaints(dict(figures.items()), arguments)
    print(*wrong, sep="\n")
    return int(bool(wrong))


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--config", choices=SETUPS, default="tiny")
    parser.add_argument("--gpus", type=float, default=0, help="gpus_per_worker; 0 uses the CPU")
    parser.add_argument("--concurrency", type=int, default=1, help="trials at once")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--halve", action="store_true", help="short of memory in the last trial")
    parser.add_argument("--break", dest="broken", action="store_true", help="a GPU's process")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def tell_ray_of_gpus() -> None:
    """Let Ray know of the GPUs that torch sees: it asks a library that may be missing."""
    if not NvidiaGPUAcceleratorManager.get_current_node_num_accelerators():
        os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"GPU": torch.cuda.device_count()})
        print("Ray does not find the GPU by itself; it is told")


def write_space(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write data, tokenizer, preset and space; return the space file."""
    setup = SETUPS[arguments.config]
    cauldron = hub_data.write_cauldron(folder / "the_cauldron", setup.rows)
    mmstar = hub_data.write_mmstar(folder / "MMStar", setup.questions_per_axis)
    texts = hub_data.training_texts(cauldron, mmstar)
    tokenizer = hub_data.write_tokenizer(folder / "tokenizer", texts, hub_data.VLM.lm_vocab_size)
    vlm = dataclasses.replace(
        setup.vlm, lm_tokenizer=str(tokenizer), vlm_load_backbone_weights=False
    )
    preset = {
        "train_dataset_path": str(cauldron),
        "train_dataset_name": list(hub_data.CAULDRON_NAMES),
        "test_dataset_path": str(mmstar),
        "val_ratio": 0.1,
        "batch_size": setup.batch_size,
        "epochs": 2,
        "compile": arguments.compile,
        "log_wandb": False,
        "vlm": {k: v for k, v in dataclasses.asdict(vlm).items() if v != getattr(VLMConfig(), k)},
    }
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    space = {
        "preset": str(folder / "preset.yaml"),
        "search": {
            "lr_mp": {"log_uniform": [1e-4, 1e-2]},
            "lr_backbones": {"log_uniform": [1e-5, 1e-3]},
        },
        "scheduler": {"rungs": 2},
        "budget": {"trials": arguments.trials},
        "confirm": {"top": 0},
        "resources": {"cpus_per_worker": 1, "gpus_per_worker": arguments.gpus},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder / "space.yaml"


def search(space: Path, folder: Path, arguments: argparse.Namespace, figures: Figures) -> None:
    """Run the search; write down what it came to."""
    memory_log = folder / "memory.jsonl"
    watched = functools.partial(
        watched_trial,
        log=memory_log,
        short_trial=arguments.trials - 1 if arguments.halve else None,
        broken_trial=1 if arguments.broken else None,
    )
    noting = Noting(figures, memory_log)
    outcome = run_plan(
        plan_search(load_space(space)),
        folder / "results",
        concurrency=arguments.concurrency,
        observers=[noting],
        start_workers=functools.partial(worker_groups, run_trial=watched),
    )
    noting.note_memory()
    figures.add(broken=arguments.broken and broken_by(memory_log).exists())
    was_short = arguments.halve and arguments.gpus > 0
    figures.add(
        seconds=time.time() - noting.started_at,
        ended_by=outcome.summary["ended_by"],
        has_report=(outcome.folder / "report.html").exists(),
        halved=has_halved(noting.ended, arguments.trials - 1) if was_short else None,
    )


class Noting(Observer):
    """Writes down what the trials have come to whenever one has ended."""

    def __init__(self, figures: Figures, memory_log: Path) -> None:
        self._figures, self._memory_log = figures, memory_log
        self.started_at = time.time()
        self.ended: list[TrialRecord] = []

    def begin(self, start: RunStart) -> None:
        self._figures.add(cluster_seconds=time.time() - self.started_at)

    def trial_changed(self, record: TrialRecord) -> None:
        if record.end is not None:
            self.ended.append(record)
            self._figures.add(**findings(self.ended, self.started_at))
            self.note_memory()

    def note_memory(self) -> None:
        """Write down what workers had so far; that of a trial comes a little after its end."""
        lines = self._memory_log.read_text().splitlines() if self._memory_log.exists() else []
        memory = [json.loads(line) for line in lines]
        self._figures.add(memory=memory, memory_growth_gb=memory_growth(memory))


def findings(records: Sequence[TrialRecord], started_at: float) -> dict[str, Any]:
    """Return what the trials that have ended come to.

    Args:
        started_at: when the search began, in seconds since the epoch.
    """
    firsts = [record.first_step_at for record in records if record.first_step_at is not None]
    last = [record.reports[-1].speed for record in records if record.reports]
    speeds = [speed.samples_per_second for speed in last if speed]
    between = turnarounds(records)
    return {
        "states": [record.state for record in records],
        "reasons": [record.reason for record in records],
        "seconds_to_first_step": min(firsts) - started_at if firsts else None,
        "turnaround_seconds": statistics.median(between) if between else None,
        "longest_turnaround_seconds": max(between, default=None),
        "both_at_once_seconds": both_at_once(records),
        "samples_per_second": (statistics.median(speeds) if speeds else None),
        "notes": sorted({note for record in records for note in notes_of(record)}),
        "trials": [about(record) for record in records],
    }


def has_halved(records: Sequence[TrialRecord], number: int) -> bool:
    """Return whether the trial `number` has trained with halves because its memory was short."""
    notes = [note for record in records if record.number == number for note in notes_of(record)]
    return any(note.startswith(HALVED) for note in notes)


def watched_trial(
    job: Job,
    resources: Resources,
    interrupted: Callable[[], bool],
    on_update: OnUpdate = ignore,
    *,
    log: Path,
    short_trial: int | None,
    broken_trial: int | None,
) -> Generator[Report, None, None]:
    """Run a trial as always, and write down the memory of this worker before and after it.

    Args:
        short_trial: number of the trial that does not get the memory that the one before it took.
        broken_trial: number of the trial in which the GPU fails once.
    """
    on_gpu = resources.device.type == "cuda"
    if on_gpu and job.number == broken_trial and not broken_by(log).exists():
        broken_by(log).write_text(str(os.getpid()))
        torch.zeros(1, device=resources.device)[torch.ones(1, dtype=torch.long).cuda()]
    before = occupied(on_gpu)
    if on_gpu and job.number == short_trial:
        peak = json.loads(log.read_text().splitlines()[-1])["peak_gb"]
        limit_gpu_memory(MEMORY_SHARE * peak)
    try:
        yield from run_trial(job, resources, interrupted, on_update)
    finally:
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        reserved = torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        line = {
            "trial": job.number,
            "worker": os.getpid(),
            "before_gb": before,
            "after_gb": occupied(on_gpu),
            "peak_gb": peak,
            "peak_reserved_gb": reserved,
        }
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def broken_by(log: Path) -> Path:
    """Return the file that says which process has had its GPU broken."""
    return log.with_name("broken")


def occupied(on_gpu: bool) -> float:
    """Return the GB of this worker's tensors on the GPU, or of its whole memory on the CPU."""
    in_use = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return in_use / 1e9


def limit_gpu_memory(gigabytes: float) -> None:
    """Let this process have no more of the GPU's memory."""
    torch.cuda.empty_cache()  # what it has already would not be limited
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def memory_growth(memory: Sequence[Mapping[str, Any]]) -> float | None:
    """Return by how many GB a worker's memory after a trial exceeds that after its first one, at
    most; None if no worker had two."""
    first: dict[int, float] = {}
    growths = []
    for line in memory:
        if line["worker"] in first:
            growths.append(line["after_gb"] - first[line["worker"]])
        first.setdefault(line["worker"], line["after_gb"])
    return max(growths, default=None)


def both_at_once(records: Sequence[TrialRecord]) -> float:
    """Return for how many seconds trials of several worker groups were training at once."""
    spans: dict[str, tuple[float, float]] = {}
    for leg in (leg for record in records for leg in record.legs):
        if leg.first_step_at is not None:
            start, end = spans.get(leg.worker_group, (leg.first_step_at, leg.ended_at))
            spans[leg.worker_group] = min(start, leg.first_step_at), max(end, leg.ended_at)
    if len(spans) < 2:
        return 0.0
    starts, ends = zip(*spans.values(), strict=True)
    return max(0.0, sorted(ends)[-2] - sorted(starts)[1])


def notes_of(record: TrialRecord) -> Sequence[str]:
    return record.reports[-1].notes if record.reports else ()


def about(record: TrialRecord) -> dict[str, Any]:
    """Return what the figures say of a trial."""
    last = dataclasses.asdict(record.reports[-1]) if record.reports else {}
    names = ("seconds", "evaluation_seconds", "speed")
    return {
        "number": record.number,
        "worker_group": record.worker_group,
        "samples_seen": record.samples_seen,
        "train_loss": record.metrics.get("train_loss"),
        **{name: last.get(name) for name in names},
    }


def print_worker_logs(folder: Path) -> None:
    """Print the end of what the workers wrote."""
    for path in sorted(folder.glob("group-*.log")):
        lines = path.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
        print(f"--- {path.name}", *lines, sep="\n", flush=True)


def complaints(found: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return what is not as it should be."""
    states, growth = found.get("states", []), found.get("memory_growth_gb") or 0.0
    wrong = {
        f"the trials ended so: {states}": len(states) != arguments.trials or "failed" in states,
        "there is no report.html": not found["has_report"],
        f"the memory of the GPU grew by {growth:.2f} GB": arguments.gpus > 0
        and growth > MAX_GROWTH_GB,
        "short of memory, the last trial did not halve its batch": found["halved"] is False,
        "no GPU failed": arguments.broken and arguments.gpus > 0 and not found["broken"],
        "no trials ran at once": arguments.concurrency > 1 and not found["both_at_once_seconds"],
    }
    return [text for text, is_so in wrong.items() if is_so]


if __name__ == "__main__":
    sys.exit(main())
