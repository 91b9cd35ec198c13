"""Earlier searches on LCBench, for searches that learn from them: see `transfer.py`."""

import zlib
from collections.abc import Callable

from benchmarks.lcbench_curves import SurrogateCurves
from benchmarks.lcbench_surrogate import CHOOSE, FINAL
from benchmarks.replay_methods import Build, Setting
from benchmarks.transfer import after

_TASKS = (*CHOOSE, *FINAL)


def shorter(epochs: int) -> Callable[[Setting], SurrogateCurves]:
    """Return what makes the curves of the same task in their first epochs, with other noise."""
    return lambda setting: _curves(setting).of(num_epochs=epochs, noise_seed=_noise(setting))


def another_task(setting: Setting) -> SurrogateCurves:
    """Return the curves of another task, which differs by the seed."""
    curves = _curves(setting)
    place = _TASKS.index(curves.task) + 1 + setting.seed % (len(_TASKS) - 1)
    return curves.of(task=_TASKS[place % len(_TASKS)], noise_seed=_noise(setting))


def _curves(setting: Setting) -> SurrogateCurves:
    assert isinstance(setting.table, SurrogateCurves), "the methods are of this benchmark"
    return setting.table


def _noise(setting: Setting) -> int:
    return zlib.crc32(f"older {setting.seed}".encode())


TRANSFERS: dict[str, Build] = {
    "auto, after a tenth": after(shorter(5), trainings=2),
    "auto, after another task": after(another_task, trainings=16),
    "auto, after shuffled trials": after(shorter(5), trainings=2, shuffled=True),
}
"""The earlier searches trained as much as 2 or 16 trainings of 52 epochs."""
