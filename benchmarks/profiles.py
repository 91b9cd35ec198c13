"""Where the time of a training step goes: operators, kernels, and gaps between them.

    python benchmarks/profiles.py                      # the small configuration, on the CPU
    python benchmarks/profiles.py --config 222m        # on a GPU

Takes some steps of `nanovlm.training.loop.train` as `train_step.py` does, under torch's profiler.
What a GPU does is read from the profiler's trace: kernels and copies with their times, and the
calls that launched them. The GPU is idle where none of them runs. The profiler itself makes a step
slower, and with it the share of gaps larger: `seconds_a_step` is with it, `plain_seconds_a_step`
without. `host_seconds_a_step`, without it too, is what Python and the launches take: where it comes
near the whole step, the GPU waits for the host. Python's own profiler says what the host does.
"""

import argparse
import cProfile
import io
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import model_parser_of
from benchmarks.figures import Figures
from benchmarks.setups import VLM_CONFIGS
from benchmarks.sides import OurSide
from benchmarks.train_step import train_config, training_texts
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.steps import Steps

NUM_ROWS = 25
NUM_KERNELS = 60
NUM_PLAIN_ROUNDS = 2
"""Before the profile, for the time without it."""

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
"""What the profiler's trace calls them."""

Event = Mapping[str, Any]
"""Of a trace in Chrome's format: `cat`, `name`, and `ts` and `dur` in microseconds."""


def main() -> None:
    imports_seconds = time.time() - psutil.Process().create_time()
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    config = train_config(arguments.config, arguments)
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
    rounds = [arguments.warmup_steps, *[arguments.steps] * (NUM_PLAIN_ROUNDS + 2)]
    side = OurSide(model, config, training_texts(config), device, rounds)
    warm_up = side.run()
    host: list[float] = []
    with timed_takes(host):
        plain = min(side.run().seconds for _ in range(NUM_PLAIN_ROUNDS))
    python_table = profiled_python(side.run)
    seconds, table, events = profiled(lambda: side.run().seconds, device)
    figures = Figures(
        arguments.json,
        config=arguments.config,
        batch_size=config.batch_size,
        steps=arguments.steps,
        imports_seconds=imports_seconds,
        warmup_seconds=warm_up.seconds,
        plain_seconds_a_step=plain / arguments.steps,
        host_seconds_a_step=statistics.median(host),
        seconds_a_step=seconds / arguments.steps,
    )
    figures.add(
        **gpu_activity(events, arguments.steps),
        table=table.splitlines(),
        python_table=python_table.splitlines(),
    )
    print(table, python_table, sep="\n")
    print(f"{plain / arguments.steps:.4f} s a step, {seconds / arguments.steps:.4f} s profiled")


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = model_parser_of(__doc__)
    parser.add_argument("--config", choices=VLM_CONFIGS, default="222m" if on_gpu else "small")
    parser.add_argument("--batch-size", type=int, help="32; 256 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, help="auto as a user has it")
    parser.add_argument("--steps", type=int, default=2, help="under the profiler")
    parser.add_argument("--warmup-steps", type=int, default=3)
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (256 if arguments.device == "cuda" else 32)
    arguments.rounds = NUM_PLAIN_ROUNDS + 2
    return arguments


@contextmanager
def timed_takes(seconds: list[float]) -> Iterator[None]:
    """Note how long the host takes for each step, which on a GPU is to launch it."""
    take = Steps.take

    def timed(steps: Steps, step: int, interrupted: bool) -> torch.Tensor:
        started = time.perf_counter()
        try:
            return take(steps, step, interrupted)
        finally:
            seconds.append(time.perf_counter() - started)

    Steps.take = timed  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Steps.take = take  # type: ignore[method-assign]


def profiled_python(run: Callable[[], object]) -> str:
    """Return the table of Python's own profiler, which makes all slower, for what `run` does."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(NUM_ROWS)
    return text.getvalue()


def profiled(run: Callable[[], float], device: torch.device) -> tuple[float, str, Sequence[Event]]:
    """Return what `run` returns, torch's table of the operators, and the events of the trace."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        result = run()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    table = averages.table(sort_by=key, row_limit=NUM_ROWS, max_name_column_width=60)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return result, table, json.loads(path.read_text())["traceEvents"]


def gpu_activity(events: Iterable[Event], num_steps: int) -> dict[str, Any]:
    """Return what the GPU did in `num_steps` steps; None for each if there was none at work."""
    complete = [event for event in events if event.get("ph") == "X"]
    work = [event for event in complete if event.get("cat") in GPU_WORK]
    names = ("kernels_a_step", "launches_a_step", "gpu_idle_fraction", "longest_kernels")
    if not work:
        return dict.fromkeys(names)
    kernels = [event for event in work if event["cat"] == "kernel"]
    busy, span = busy_and_span([(event["ts"], event["ts"] + event["dur"]) for event in work])
    launches = sum(event["name"] in LAUNCHES for event in complete)
    idle, longest = 1 - busy / span, longest_kernels(kernels, num_steps)
    values = (len(kernels) / num_steps, launches / num_steps, idle, longest)
    return dict(zip(names, values, strict=True))


def busy_and_span(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return how long at least one of the intervals lasts, and the time from the first start to
    the last end."""
    ordered = sorted(intervals)
    busy, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - ordered[0][0]


def longest_kernels(kernels: Iterable[Event], num_steps: int) -> list[dict[str, Any]]:
    """Return the kernels that take most time, by name: milliseconds and calls a step."""
    times = defaultdict[str, list[float]](list)
    for kernel in kernels:
        times[kernel["name"]].append(kernel["dur"])
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name,
            "milliseconds_a_step": sum(spent) / 1e3 / num_steps,
            "calls_a_step": len(spent) / num_steps,
        }
        for name, spent in ordered[:NUM_KERNELS]
    ]


if __name__ == "__main__":
    main()
