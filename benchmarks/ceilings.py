"""What this machine is, and what its device does at best: the ceilings for all other figures.

    python benchmarks/ceilings.py

A product of two large square matrices in bfloat16 and in float32 (without TF32, as in an
evaluation), and copies on the device and between it and pinned memory of the host. Each is
repeated for about a fifth of a second, the best of five times counts.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import psutil
import torch
from torch import Tensor

from benchmarks.command_line import device_parser_of
from benchmarks.figures import Figures
from nanovlm.models.compiled import find_compile_obstacle
from nanovlm.process import usable_cpus
from nanovlm.training.flops import peak_flops_per_second

PACKAGES = ("torch", "triton", "transformers", "huggingface_hub", "ray", "numpy", "pytest")
SIZES = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices."""
COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
NUM_TRIES = 5
SECONDS_A_TRY = 0.2
SMI = "name,driver_version,memory.total,power.limit,clocks.max.sm,compute_mode,mig.mode.current"


def main() -> None:
    arguments = parse_arguments()
    figures = Figures(arguments.json, **describe_machine())
    figures.add(**describe_device(arguments.device))
    for measure in (products, copies):
        figures.add(**measure(torch.device(arguments.device)))
    if arguments.compile:  # last, since it takes longest
        figures.add(compile_obstacle=find_compile_obstacle(arguments.device))
    for name, value in figures.items():
        print(f"{name}: {value}")


def parse_arguments() -> argparse.Namespace:
    parser = device_parser_of(__doc__)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find out whether this machine can",
    )
    return parser.parse_args()


def describe_machine() -> dict[str, Any]:
    """Return what is known of the host."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "shared_memory_gb": free_gb("/dev/shm"),
        "free_disk_gb": free_gb(tempfile.gettempdir()),
        "nvidia_smi": nvidia_smi(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_gb(folder: str) -> float | None:
    return shutil.disk_usage(folder).free / 1e9 if os.path.isdir(folder) else None


def nvidia_smi() -> str | None:
    """Return what NVIDIA's own program says, None where it is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return (done.stdout or done.stderr).strip()


def describe_device(device: str) -> dict[str, Any]:
    """Return what torch knows of the device; None for each on the CPU."""
    names = ("card", "gpu_memory_gb", "multiprocessors", "cuda", "cudnn", "data_sheet_tflops")
    if device == "cpu":
        return dict.fromkeys(names)
    card = torch.cuda.get_device_properties(0)
    peak = peak_flops_per_second(card.name)
    values = (
        card.name,
        card.total_memory / 1e9,
        card.multi_processor_count,
        torch.version.cuda,
        torch.backends.cudnn.version(),
        peak and peak / 1e12,
    )
    return dict(zip(names, values, strict=True))


def products(device: torch.device) -> dict[str, Any]:
    """Return TFLOP/s of products of square matrices."""
    size = SIZES[device.type]
    torch.backends.cuda.matmul.allow_tf32 = False
    speeds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = seconds_of(partial(torch.mm, a, b, out=out), device)
        speeds[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds / 1e12
    return {
        "product_size": size,
        "bfloat16_product_tflops": speeds["bfloat16"],
        "float32_product_tflops": speeds["float32"],
    }


def copies(device: torch.device) -> dict[str, float | None]:
    """Return GB/s of copies; on the device what is read and what is written counts."""
    num_bytes = COPY_BYTES[device.type]
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    speeds: dict[str, float | None] = {
        "device_copy_gb_per_second": 2
        * num_bytes
        / copy_seconds(torch.empty_like(here), here)
        / 1e9,
        "host_to_device_gb_per_second": None,
        "device_to_host_gb_per_second": None,
    }
    if device.type == "cuda":
        part = here[: num_bytes // 8]
        host = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
        speeds["host_to_device_gb_per_second"] = len(part) / copy_seconds(part, host) / 1e9
        speeds["device_to_host_gb_per_second"] = len(part) / copy_seconds(host, part) / 1e9
    return speeds


def copy_seconds(target: Tensor, source: Tensor) -> float:
    device = source.device if source.device.type == "cuda" else target.device
    return seconds_of(lambda: target.copy_(source, non_blocking=True), device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one `work`: the best of some tries of many in a row."""

    def timed(repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(1)  # libraries and memory
    repeats = max(1, round(SECONDS_A_TRY / timed(1)))
    return min(timed(repeats) for _ in range(NUM_TRIES)) / repeats


if __name__ == "__main__":
    main()
