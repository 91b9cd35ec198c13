"""The sum of gradients over workers: in buckets amid the backward pass, or one message after it.

    python benchmarks/gradient_sum.py                           # two gloo workers, the small model
    python benchmarks/gradient_sum.py --config 222m --batch-size 2 --rounds 2 --steps 1

Workers are processes of this machine with a thread each. Both sides run the real training loop on
the same samples, uncompiled, in turns. One message is what the loop did before: a copy of all
gradients behind each other, summed, and copied back.

Printed are the seconds of a step, those of the slowest worker, and the memory that gradients take
when they are summed: what they lie in, and what is allocated to send them. What gloo or the network
holds besides is not counted.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import parser_of
from benchmarks.setups import VLM_CONFIGS, make_texts
from benchmarks.sides import OurSide
from nanovlm.config.schema import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, gather_objects, rank
from nanovlm.training import loop
from nanovlm.training.gradient_sum import GradientSum

CPU = torch.device("cpu")


class OneMessage:
    """In the place of GradientSum: all gradients in one message after the backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def sending(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        all_reduce_sum_([p.grad for p in self._parameters if p.grad is not None])


Way = type[GradientSum] | type[OneMessage]


class Side:
    """One way to sum the gradients, and the training that does it."""

    def __init__(self, way: Way, config: TrainConfig, rounds: list[int]) -> None:
        self._way = way
        self._model = VisionLanguageModel(config.vlm, config.seed)
        num_samples = 20 * -(-sum(rounds) * config.batch_size // 12)  # 12 of 20 fit
        texts = make_texts(config.vlm, num_samples, 64)
        self._training = OurSide(self._model, config, texts, CPU, rounds)
        self.bytes_of_gradients = 0
        """When they are summed: what they lie in, and what is allocated to send them."""

    def warm_up(self) -> None:
        """Take the steps of the first round, and look at the memory meanwhile."""
        finish = self._way.finish

        def watched(gradients: GradientSum | OneMessage) -> None:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                finish(gradients)  # type: ignore[arg-type]  # one of its own class
            sent = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events() or [])
            self.bytes_of_gradients = sent + gradient_bytes(self._model)

        with (
            mock.patch.object(loop, "GradientSum", self._way),
            mock.patch.object(self._way, "finish", watched),
        ):
            self._training.run()

    def run(self) -> float:
        """Take the steps of the next round; return the seconds of the slowest worker."""
        return max(gather_objects(self._training.run().seconds))

    @property
    def bytes_of_weights(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def losses(self) -> list[float]:
        """The smoothed loss after each round."""
        return self._training.losses


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes that the gradients lie in."""
    memory = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def main() -> None:
    arguments = parse_arguments()
    config = TrainConfig(
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        epochs=1,
        compile=False,
        cpu_threads=1,
        vlm=VLM_CONFIGS[arguments.config],
    )
    rounds = [1, *[arguments.steps] * arguments.rounds]
    size = arguments.workers
    print(f"{arguments.config}, batch_size={config.batch_size}, {size} gloo workers on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, folder, config, rounds), nprocs=size)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--config", choices=VLM_CONFIGS, default="small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    return parser.parse_args()


def work(number: int, size: int, folder: str, config: TrainConfig, rounds: list[int]) -> None:
    """Run as a worker; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=size)
    ways: dict[str, Way] = {"in buckets": GradientSum, "one message": OneMessage}
    sides = {name: Side(way, config, rounds) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for side in sides.values():
        side.warm_up()
    for num_steps in rounds[1:]:
        for name, side in sides.items():
            dist.barrier()
            seconds[name].append(side.run() / num_steps)
    if rank() == 0:
        report(sides, seconds)
    dist.barrier()
    os._exit(0)  # an ordinary end now and then aborts in gloo's threads, with all work done


def report(sides: dict[str, Side], seconds: dict[str, list[float]]) -> None:
    """Print a line for each side, and how they compare."""
    for name, side in sides.items():
        times = sorted(seconds[name])
        share = side.bytes_of_gradients / side.bytes_of_weights
        print(
            f"{name:11}: {statistics.median(times):.3f} s a step ({times[0]:.3f} to "
            f"{times[-1]:.3f}); gradients {side.bytes_of_gradients / 1e6:.1f} MB, "
            f"{share:.2f} times the weights"
        )
    ratios = [old / new for new, old in zip(*seconds.values(), strict=True)]
    losses = [side.losses for side in sides.values()]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"one message / in buckets: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}), by round; losses differ by at most {difference:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
