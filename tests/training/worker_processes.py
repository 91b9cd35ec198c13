"""What one, two and three workers of a trial compute, for test_several_workers.py.

Three processes start once. Two of them make a group (gloo), while the third works alone; then all
three make one.
"""

import dataclasses
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from nanovlm.errors import UserError
from nanovlm.messages import Job, Speed
from nanovlm.parallel import all_reduce_sum_, broadcast_object, gather_objects, rank, world_size
from nanovlm.resources import Resources
from nanovlm.training import gradient_sum
from nanovlm.training.gradient_sum import GradientSum
from nanovlm.training.loop import never, train
from nanovlm.training.meter import Meter
from nanovlm.training.passes import MicroBatchSize
from nanovlm.training.steps import NonFiniteLossError, TrialInterrupted
from nanovlm.trial import run_trial
from tests.tiny import digits_config, vlm_config
from tests.training.clocks import SetClock

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = digits_config(
    vlm_config(vit_hidden_dim=32, lm_hidden_dim=32, lm_inter_dim=64),
    lr_mp=3e-3,
    lr_backbones=3e-3,
    batch_size=7,  # two workers take 4 and 3 samples of a step, three take 3, 2 and 2
    mmstar_batch_size=100,
)
DROPPING = dataclasses.replace(
    CONFIG, vlm=dataclasses.replace(CONFIG.vlm, vit_dropout=0.1, lm_dropout=0.1)
)
NUM_STEPS = 8
EVERY_STEP = tuple(range(7, 7 * NUM_STEPS + 1, 7))
BUCKET_BYTES = 8192
"""So that this model's gradients travel in many messages."""


def loss_curve(resources: Resources, **changes: Any) -> list[float]:
    config = dataclasses.replace(CONFIG, **changes)
    samples, _ = resources.training_data(config)
    model = resources.model(config)
    training = train(model, samples, config, EVERY_STEP, device=CPU)
    losses = [next(training).train_loss for _ in range(NUM_STEPS)]
    assert num_hooks(model) == 0
    model.zero_grad()  # as the end of a trial does
    return losses


def num_hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


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
    """Only the last worker is stopped, at its third question."""
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


def speed(resources: Resources) -> Speed:
    """Each worker counts the whole batch; the last one waits longer for its part of it."""
    clock = SetClock()
    meter = Meter(CONFIG, CPU, clock)
    meter._peak = 1e12  # as if each worker had a GPU of this peak
    for _ in range(3):
        with meter.waiting():
            clock.now += 1.0 + rank()
        clock.now += 3.0 - rank()
        meter.add([5] * CONFIG.batch_size, num_labels=14)
    return meter.read()


class ScarceMemory:
    """Lets some passes of this worker run out of memory."""

    def __init__(self, passes: Collection[int], where: str) -> None:
        """Args:
        passes: their numbers, counted over all steps and attempts from 0.
        where: before the `forward` of the decoder, or after its `backward`.
        """
        self._passes, self._where = passes, where
        self._numbers = itertools.count()
        self.sent_before: int | None = None
        """Messages that this worker had sent when its memory ran out for the first time."""

    def __enter__(self) -> "ScarceMemory":
        self._watch = mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce)
        self._all_reduce = self._watch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watch.__exit__(*exception)

    @property
    def sent(self) -> list[int]:
        """Numbers in each message that this worker has sent."""
        return [call.args[0].numel() for call in self._all_reduce.call_args_list]

    def hook(self, encoder: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        if next(self._numbers) in self._passes:
            if self._where == "forward":
                self._run_out(output)
            output.register_hook(self._run_out)

    def _run_out(self, tensor: Tensor) -> None:
        if self.sent_before is None:
            self.sent_before = len(self.sent)
        raise torch.OutOfMemoryError("CUDA out of memory.")


def steps_with_little_memory(
    resources: Resources,
    passes: Mapping[int, Collection[int]],
    where: str = "backward",
    interrupted: Callable[[], bool] = never,
    **changes: Any,
) -> dict[str, Any]:
    """Take three steps of 7 samples a worker, first in passes of 4 and 3 samples.

    Args:
        passes: by rank, the passes that run out of memory.
    """
    config = dataclasses.replace(DROPPING, batch_size=7 * world_size(), **changes)
    samples, _ = resources.training_data(config)
    model = resources.model(config)
    size = MicroBatchSize(CPU)
    size.restore(4)
    torch.manual_seed(rank())
    milestones = [config.batch_size * step for step in (1, 2, 3)]
    numbers: dict[str, Any] = {}
    with ScarceMemory(passes.get(rank(), ()), where) as memory:
        handle = model.vision_encoder.register_forward_hook(memory.hook)
        training = train(
            model,
            samples,
            config,
            milestones,
            device=CPU,
            interrupted=interrupted,
            micro_batch_size=size,
        )
        try:
            numbers["losses"] = [next(training).train_loss for _ in milestones]
        except (torch.OutOfMemoryError, TrialInterrupted) as error:
            numbers["error"] = str(error)
        handle.remove()
    assert num_hooks(model) == 0
    return numbers | {
        "weights": [parameter.sum().item() for parameter in model.parameters()],
        "limit": size.limit,
        "sent": memory.sent,
        "sent_before": memory.sent_before,
    }


def scarce_memory_numbers(resources: Resources) -> dict[str, dict[str, Any]]:
    """Of three workers that are short of memory now and then, and of three that are not."""
    return {
        "enough, size 2": steps_with_little_memory(resources, {}, micro_batch_size=2),
        "enough, size 1": steps_with_little_memory(resources, {}, micro_batch_size=1),
        "one in its last pass": steps_with_little_memory(resources, {1: {1}}),
        "one in its first pass": steps_with_little_memory(resources, {2: {0}}, "forward"),
        "all": steps_with_little_memory(resources, {0: {1}, 1: {1}, 2: {0}}),
        "another one again": steps_with_little_memory(resources, {0: {1}, 2: {2 + 3}}),
        "enough, size 2, again": steps_with_little_memory(resources, {}, micro_batch_size=2),
        "no smaller": steps_with_little_memory(resources, {1: {3}}, micro_batch_size=4),
        "interrupted": steps_with_little_memory(
            resources, {1: {1}}, interrupted=lambda: rank() == 2
        ),
    }


def gradient_sums(device: torch.device) -> dict[str, Any]:
    """Sum gradients of four layers: rank 0 alone uses the second, nobody the last."""
    layers = nn.ModuleList(nn.Linear(40, 40, device=device) for _ in range(4))
    parameters = list(layers.parameters())
    gradients = GradientSum(parameters)
    for step in range(2):
        losses = [_loss(layers, step, number) for number in range(2)]
        ours = torch.autograd.grad(
            losses[0] + losses[1], parameters, allow_unused=True, retain_graph=True
        )
        gradients.clear()
        losses[0].backward()
        with gradients.sending():
            losses[1].backward()
        gradients.finish()
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, ours, strict=True)]
    everyone = gather_objects([gradient.cpu() for gradient in whole])
    found = [p.grad for p in parameters if p.grad is not None]
    memory = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in found}
    return {
        "found": [gradient.cpu() for gradient in found],
        "expected": [sum(parts) for parts in zip(*everyone, strict=True)],
        "buckets": len(memory),
        "bytes": sum(memory.values()),
        "bytes_of_parameters": sum(p.nbytes for p in parameters),
    }


def _loss(layers: nn.ModuleList, step: int, number: int) -> Tensor:
    torch.manual_seed(100 * step + 10 * number + rank())
    x = torch.randn(5, 40).to(next(layers.parameters()).device)
    for layer in layers[:3] if rank() == 0 else [layers[0], layers[2]]:
        x = layer(x).tanh()
    return x.sum()


def numbers_of_any_group(resources: Resources) -> dict[str, Any]:
    """What depends on the number of workers by rounding alone."""
    return {
        "whole": loss_curve(resources),
        "micro_batches": loss_curve(resources, micro_batch_size=2),
        "vision_encoder_frozen": loss_curve(resources, freeze="vision_encoder"),
        "backbones_frozen": loss_curve(resources, freeze="backbones", micro_batch_size=2),
        "whole_again": loss_curve(resources),
    }


def numbers_of_one_or_two(resources: Resources, folder: Path) -> dict[str, Any]:
    return numbers_of_any_group(resources) | {
        "trial": trial_metrics(resources, folder / f"saved_by_{rank()}_of_{world_size()}"),
        "interrupted": first_interrupted_step(resources),
        "speed": speed(resources),
        "set_up": failed_set_up(resources),
        "not_finite": non_finite_step(resources),
    }


def numbers_of_two(folder: Path) -> dict[str, Any]:
    numbers = numbers_of_one_or_two(Resources("cpu"), folder)
    with pytest.raises(UserError) as caught:
        loss_curve(Resources("cpu"), batch_size=1)
    numbers["one_sample"] = str(caught.value)
    numbers["undisturbed"] = undisturbed_metrics(Resources("cpu"))
    numbers["resumed"] = resumed_metrics(Resources("cpu"), folder)
    tensors = [torch.tensor(1.0 + rank()), torch.full((2, 2), 10.0 * rank()).T]
    all_reduce_sum_(tensors)
    numbers["sums"] = [tensor.tolist() for tensor in tensors]
    numbers["gathered"] = gather_objects(("rank", rank()))
    numbers["broadcast"] = broadcast_object({"from": rank()})
    return numbers


def numbers_of_three() -> dict[str, Any]:
    resources = Resources("cpu")
    return numbers_of_any_group(resources) | {
        "scarce_memory": scarce_memory_numbers(resources),
        "gradient_sums": gradient_sums(CPU),
        "gradient_sums_on_gpu": gradient_sums(GPU) if torch.cuda.is_available() else None,
    }


def work(number: int, folder: Path) -> None:
    """Run in a process; leave a file for each group that it has been in: `RANK_of_SIZE`."""
    torch.set_num_threads(1)
    gradient_sum.BUCKET_BYTES = BUCKET_BYTES
    if number < 2:
        dist.init_process_group("gloo", f"file://{folder}/two", rank=number, world_size=2)
        save(folder, numbers_of_two(folder))
        dist.destroy_process_group()
    else:
        save(folder, numbers_of_one_or_two(Resources("cpu"), folder))
    dist.init_process_group("gloo", f"file://{folder}/three", rank=number, world_size=3)
    save(folder, numbers_of_three())
    dist.barrier()
    os._exit(0)  # an ordinary end now and then aborts in gloo's threads, with all work done


def save(folder: Path, numbers: dict[str, Any]) -> None:
    (folder / f"{rank()}_of_{world_size()}").write_bytes(pickle.dumps(numbers))


def run_processes(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return by the size of a group what each of its workers computed."""
    # Imported once for all three; optimizers import torch._dynamo when they are first used.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    mp.start_processes(work, (folder,), nprocs=3, start_method="forkserver")
    return {
        size: [pickle.loads((folder / f"{n}_of_{size}").read_bytes()) for n in range(size)]
        for size in (1, 2, 3)
    }
