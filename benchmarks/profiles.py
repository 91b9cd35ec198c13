"""Where the time of some steps goes, by operator."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

NUM_ROWS = 25


def profile_table(run: Callable[[], object], device: torch.device) -> str:
    """Return torch's table of the operators in which `run` spends most time."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    return averages.table(sort_by=key, row_limit=NUM_ROWS, max_name_column_width=60)
