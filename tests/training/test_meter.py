"""The meter on a clock that the test sets."""

import dataclasses
import resource

import pytest
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.messages import Speed
from nanovlm.training.flops import PEAK_TFLOPS, model_flops, trained_parts
from nanovlm.training.meter import Meter, StreamClock
from tests.tiny import vlm_config
from tests.training.clocks import SetClock

CPU = torch.device("cpu")
CONFIG = TrainConfig(vlm=vlm_config())
LENGTHS, NUM_LABELS = [5, 9, 7], 4


class LateClock(SetClock):
    """Like a GPU's: a wait is known to be over only when a later mark was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = 0.0

    def has_passed(self, mark: float) -> bool:
        return mark <= self.waited_for

    def seconds(self, start: float, end: float) -> float:
        self.waited_for = max(self.waited_for, end)
        return super().seconds(start, end)


def step(meter: Meter, clock: SetClock, wait: float = 1.0, work: float = 3.0) -> None:
    with meter.waiting():
        clock.now += wait
    clock.now += work
    meter.add(LENGTHS, NUM_LABELS)


@pytest.mark.parametrize("clock", [SetClock(), LateClock()], ids=["host", "late"])
def test_the_rates_between_two_reports(clock: SetClock) -> None:
    meter = Meter(CONFIG, CPU, clock)
    step(meter, clock, wait=100.0, work=1000.0)  # the first step is left out
    step(meter, clock)
    step(meter, clock, wait=2.0, work=2.0)
    speed = meter.read()
    flops = model_flops(CONFIG.vlm, trained_parts(CONFIG)).of_samples(LENGTHS, NUM_LABELS)
    assert speed == Speed(
        samples_per_second=2 * 3 / 8,
        answer_tokens_per_second=2 * 4 / 8,
        data_wait_fraction=3 / 8,
        model_tflops_per_second=2 * flops / 8 / 1e12,
        model_flops_utilization=None,
        peak_memory_gib=speed.peak_memory_gib,
    )
    clock.now += 5000  # evaluation
    meter.start()
    step(meter, clock, wait=0.0, work=1.5)
    speed = meter.read()
    assert (speed.samples_per_second, speed.data_wait_fraction) == (2.0, 0.0)


def test_a_report_of_the_first_step_has_a_speed_too() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    step(meter, clock, wait=5.0, work=15.0)
    clock.now += 7  # the batch of the next step may be fetched before the report
    speed = meter.read()
    assert (speed.samples_per_second, speed.data_wait_fraction) == (3 / 20, 0.25)
    clock.now += 5000
    meter.start()
    step(meter, clock)
    assert meter.read().samples_per_second == 3 / 4


def test_a_batch_may_be_fetched_at_the_end_of_the_step_before() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    step(meter, clock)
    for _ in range(2):
        with meter.waiting():
            clock.now += 1
        clock.now += 1
        meter.add(LENGTHS, NUM_LABELS)
    with meter.waiting():
        clock.now += 4
    assert meter.read().data_wait_fraction == 6 / 8


def test_a_batch_that_never_came_is_no_wait() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    step(meter, clock)
    with pytest.raises(torch.OutOfMemoryError), meter.waiting():
        clock.now += 4
        raise torch.OutOfMemoryError
    step(meter, clock)
    assert meter.read().data_wait_fraction == 1 / 8


def test_few_marks_are_kept() -> None:
    """A CUDA event takes memory, and thousands of steps may lie between two reports."""
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    for _ in range(10):
        step(meter, clock)
        assert not meter._window.waits


def test_peak_memory_on_the_cpu_is_the_process_s() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    ballast = torch.ones(2**26, dtype=torch.uint8)
    step(meter, clock)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert meter.read().peak_memory_gib == pytest.approx(kib / 2**20, rel=0.01)
    assert kib * 1024 > len(ballast)


def test_utilization_is_a_share_of_the_peak() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    meter._peak = 10 * 1e12
    step(meter, clock)
    speed = meter.read()
    assert speed.model_flops_utilization == pytest.approx(speed.model_tflops_per_second / 10)


def test_speed_is_plain_numbers() -> None:
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    step(meter, clock)
    values = dataclasses.asdict(meter.read())
    assert values.pop("model_flops_utilization") is None
    assert all(type(value) is float for value in values.values())


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    device = torch.device("cuda")
    meter = Meter(CONFIG, device)
    matrix = torch.zeros(1024, 1024, device=device)
    matrix @ matrix  # loads what the first product needs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with meter.waiting():
                matrix.fill_(0.5)
            torch.cuda._sleep(100_000_000)  # clock cycles: some 50 ms
            matrix @ matrix
            meter.add(LENGTHS, NUM_LABELS)
        assert not StreamClock(device).has_passed(StreamClock(device).mark())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    speed = meter.read()
    assert 0 < speed.samples_per_second < 1000
    assert 0 <= speed.data_wait_fraction < 0.1
    assert 2**22 / 2**30 <= speed.peak_memory_gib < 1
    known = torch.cuda.get_device_name(device) in PEAK_TFLOPS
    assert (speed.model_flops_utilization is not None) == known
