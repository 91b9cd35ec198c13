"""A trial shared by two worker processes (gloo) gives the numbers of one worker.

The processes start once; everything that they can show is computed in that one go.
"""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanovlm.errors import UserError
from nanovlm.messages import Job, Speed
from nanovlm.parallel import all_reduce_sum_, broadcast_object, gather_objects, rank, world_size
from nanovlm.resources import Resources
from nanovlm.training.loop import NonFiniteLossError, TrialInterrupted, train
from nanovlm.training.meter import Meter
from nanovlm.trial import run_trial
from tests.tiny import digits_config, vlm_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # two processes import all anew

CPU = torch.device("cpu")
CONFIG = digits_config(
    vlm_config(vit_hidden_dim=32, lm_hidden_dim=32, lm_inter_dim=64),
    lr_mp=3e-3,
    lr_backbones=3e-3,
    batch_size=7,  # one worker takes 4 samples of a step, the other 3
    mmstar_batch_size=100,
)
DROPPING = dataclasses.replace(
    CONFIG, vlm=dataclasses.replace(CONFIG.vlm, vit_dropout=0.1, lm_dropout=0.1)
)
NUM_STEPS = 12
EVERY_STEP = tuple(range(7, 7 * NUM_STEPS + 1, 7))


def loss_curve(resources: Resources, **changes: Any) -> list[float]:
    config = dataclasses.replace(CONFIG, **changes)
    samples, _ = resources.training_data(config)
    training = train(resources.model(config), samples, config, EVERY_STEP, device=CPU)
    return [next(training).train_loss for _ in range(NUM_STEPS)]


def trial_metrics(resources: Resources, output_dir: Path) -> list[dict[str, float]]:
    job = Job(trial_id="t", config=CONFIG, milestones=(35,), output_dir=str(output_dir))
    metrics = []
    for report in run_trial(job, resources):
        metrics.append(report.metrics)
        resources.note("of all")
        resources.note(f"of {rank()}")
    assert report.notes == ("of all", *(f"of {number}" for number in range(world_size())))
    return metrics


def first_interrupted_step(resources: Resources) -> str:
    """Only the last worker is told to stop, at its third question."""
    asked: list[bool] = []

    def interrupted() -> bool:
        asked.append(rank() == world_size() - 1 and len(asked) >= 2)
        return asked[-1]

    job = Job(trial_id="t", config=CONFIG, milestones=(70,))
    with pytest.raises(TrialInterrupted) as caught:
        next(run_trial(job, resources, interrupted))
    return str(caught.value)


def non_finite_step(resources: Resources) -> str:
    """The weights become NaN on the last worker alone, before the second step."""
    samples, _ = resources.training_data(CONFIG)
    model = resources.model(CONFIG)
    training = train(model, samples, CONFIG, EVERY_STEP, device=CPU)
    next(training)
    if rank() == world_size() - 1:
        model.MP.proj.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError) as caught:
        next(training)
    return str(caught.value)


def failed_set_up(resources: Resources) -> str:
    """Only the last worker cannot have its data."""
    config = CONFIG
    if rank() == world_size() - 1:
        config = dataclasses.replace(CONFIG, test_dataset_path="/no/such/folder")
    with pytest.raises(UserError) as caught:
        next(run_trial(Job(trial_id="t", config=config), resources))
    return str(caught.value)


def resumed_metrics(resources: Resources, folder: Path) -> list[dict[str, float]]:
    """Cut a trial off after its first report, and go on with it."""
    job = Job(trial_id="t", config=DROPPING, milestones=(35,), state_dir=str(folder / "state"))
    running = run_trial(job, resources)
    next(running)
    running.close()
    gather_objects(None)  # rank 0 writes the state
    return [report.metrics for report in run_trial(job, resources)]


def undisturbed_metrics(resources: Resources) -> list[dict[str, float]]:
    job = Job(trial_id="t", config=DROPPING, milestones=(35,))
    return [report.metrics for report in run_trial(job, resources)]


class SetClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def has_passed(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


def speed(resources: Resources) -> Speed:
    """Each worker is told of the whole batch; the last one waits longer for its part of it."""
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    meter._peak = 1e12  # as if each worker had a GPU of this peak
    for _ in range(3):
        with meter.waiting():
            clock.now += 1.0 + rank()
        clock.now += 3.0 - rank()
        meter.add([5] * CONFIG.batch_size, num_labels=14)
    return meter.read()


def all_numbers(folder: Path) -> dict[str, Any]:
    resources = Resources("cpu")
    return {
        "whole": loss_curve(resources),
        "micro_batches": loss_curve(resources, micro_batch_size=2),
        "trial": trial_metrics(resources, folder / f"saved_by_{rank()}_of_{world_size()}"),
        "interrupted": first_interrupted_step(resources),
        "speed": speed(resources),
        "set_up": failed_set_up(resources),
        "not_finite": non_finite_step(resources),
    }


def worker(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    numbers = all_numbers(folder)
    with pytest.raises(UserError) as caught:
        loss_curve(Resources("cpu"), batch_size=1)
    numbers["one_sample"] = str(caught.value)
    numbers["undisturbed"] = undisturbed_metrics(Resources("cpu"))
    numbers["resumed"] = resumed_metrics(Resources("cpu"), folder)
    tensors = [torch.tensor(1.0 + number), torch.full((2, 2), 10.0 * number).T]
    all_reduce_sum_(tensors)
    numbers["sums"] = [tensor.tolist() for tensor in tensors]
    numbers["gathered"] = gather_objects(("rank", number))
    numbers["broadcast"] = broadcast_object({"from": number})
    (folder / f"rank_{number}").write_bytes(pickle.dumps(numbers))
    dist.barrier()
    os._exit(0)  # an ordinary end now and then aborts in gloo's threads, with all work done


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two workers computed, and last what one worker alone computes."""
    folder = tmp_path_factory.mktemp("two_workers")
    mp.spawn(worker, (folder,), nprocs=2)
    shared = [pickle.loads((folder / f"rank_{number}").read_bytes()) for number in range(2)]
    assert [path.name for path in folder.glob("saved_by_*")] == ["saved_by_0_of_2"]
    return [*shared, all_numbers(folder)]


@pytest.mark.parametrize("name", ["whole", "micro_batches"])
def test_two_workers_give_the_loss_curve_of_one(numbers: list[dict[str, Any]], name: str) -> None:
    first, second, alone = (n[name] for n in numbers)
    assert first == second
    assert first == pytest.approx(alone, abs=1e-5)


def test_a_trial_of_two_workers_gives_the_numbers_of_one(numbers: list[dict[str, Any]]) -> None:
    first, second, alone = (n["trial"] for n in numbers)
    assert first == second
    assert len(first) == len(alone) == 2
    for shared_report, report in zip(first, alone, strict=True):
        assert shared_report == pytest.approx(report, abs=1e-4)


def test_a_trial_of_two_workers_goes_on_from_its_state(numbers: list[dict[str, Any]]) -> None:
    for shared in numbers[:2]:
        assert len(shared["resumed"]) == 2
        assert shared["resumed"] == shared["undisturbed"], "each rank has its own dropout"


def test_the_speed_is_that_of_all_workers(numbers: list[dict[str, Any]]) -> None:
    first, second, alone = (n["speed"] for n in numbers)
    assert first == second
    assert first.samples_per_second == alone.samples_per_second == 7 / 4  # of the global batch
    assert first.answer_tokens_per_second == alone.answer_tokens_per_second == 14 / 4
    assert first.model_tflops_per_second == alone.model_tflops_per_second
    assert first.model_flops_utilization == first.model_tflops_per_second / 2
    assert (first.data_wait_fraction, alone.data_wait_fraction) == (0.5, 0.25)  # of the slower one


def test_all_workers_end_together(numbers: list[dict[str, Any]]) -> None:
    assert [n["interrupted"] for n in numbers] == ["interrupted at step 3"] * 3
    assert all("/no/such/folder" in n["set_up"] for n in numbers)
    assert [n["not_finite"] for n in numbers] == ["loss is nan at step 2"] * 3


def test_each_worker_needs_a_sample(numbers: list[dict[str, Any]]) -> None:
    for shared in numbers[:2]:
        assert "batch_size=1 cannot be shared by 2 workers" in shared["one_sample"]


def test_messages_between_workers(numbers: list[dict[str, Any]]) -> None:
    for shared in numbers[:2]:
        assert shared["sums"] == [3.0, [[10.0, 10.0], [10.0, 10.0]]]
        assert shared["gathered"] == [("rank", 0), ("rank", 1)]
        assert shared["broadcast"] == {"from": 0}


def test_one_worker_needs_no_process_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    tensor = torch.tensor(2.0)
    all_reduce_sum_([tensor])
    assert tensor.item() == 2
    assert gather_objects("x") == ["x"]
    assert broadcast_object("x") == "x"
