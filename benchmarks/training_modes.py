"""What deterministic operations cost in training and CUDA graphs save, and whether bits repeat.

    python benchmarks/training_modes.py                   # the tiny configuration, on the CPU
    python benchmarks/training_modes.py --config 222m     # on a GPU

First the same model trains in turns in all modes: as it is by default, with operations that may
sum in any order, and with kernels that are launched one by one. On the CPU all are the same. Then
two further processes, each with compiled code of its own, take the same steps with operations of
either kind: printed is whether their weights are the same bits.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch

from benchmarks.command_line import model_parser_of
from benchmarks.figures import Figures
from benchmarks.setups import VLM_CONFIGS
from benchmarks.sides import OurSide
from benchmarks.train_step import train_config, training_texts
from nanovlm.config.schema import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training import steps

NUM_PROCESSES = 2
NUM_HASHED_STEPS = 4


class Mode(NamedTuple):
    deterministic: bool
    is_recorded: bool = True
    """As CUDA graphs, where that can be."""


MODES = {
    "default": Mode(deterministic=True),
    "any_order": Mode(deterministic=False),
    "single_launches": Mode(deterministic=True, is_recorded=False),
}
HASHED = ("default", "any_order")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.only_hash:
        for name in HASHED:
            print(json.dumps({name: hash_after_training(MODES[name], device, arguments)}))
        return
    figures = Figures(arguments.json, config=arguments.config)
    for size in arguments.batch_sizes:
        arguments.batch_size = size
        measure(device, arguments, figures.part(f"batch_{size}"))
    figures.add(**same_bits(sys.argv[1:]))
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = model_parser_of(__doc__)
    parser.add_argument("--config", choices=VLM_CONFIGS, default="222m" if on_gpu else "tiny")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="8; 256 64 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, help="auto as a user has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--only-hash", action="store_true", help="what the further processes do")
    arguments = parser.parse_args()
    arguments.batch_sizes = arguments.batch_sizes or (
        [256, 64] if arguments.device == "cuda" else [8]
    )
    return arguments


def measure(device: torch.device, arguments: argparse.Namespace, figures: Figures) -> None:
    """Time all modes in turns; write down the median samples a second after each round."""
    rounds = [arguments.warmup_steps, *[arguments.steps] * arguments.rounds]
    sides = {}
    for name, mode in MODES.items():
        sides[name] = side(mode, device, arguments, rounds)
        with recording(mode):
            figures.add(**{f"{name}_warmup_seconds": sides[name].run().seconds})
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in rounds[1:]:
        for name, one in sides.items():
            seen[name].append(one.run().speed)
        medians = {name: statistics.median(speeds) for name, speeds in seen.items()}
        figures.add(
            **medians,
            deterministic_ratio=medians["default"] / medians["any_order"],
            recorded_ratio=medians["default"] / medians["single_launches"],
        )


def side(
    mode: Mode, device: torch.device, arguments: argparse.Namespace, rounds: list[int]
) -> OurSide:
    """Return a new model that begins to train in this mode."""
    config: TrainConfig = train_config(arguments.config, arguments)
    config = dataclasses.replace(config, deterministic=mode.deterministic)
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
    return OurSide(model, config, training_texts(config), device, rounds)


@contextmanager
def recording(mode: Mode) -> Iterator[None]:
    """Let a training that begins in here record its passes, or launch each of their kernels."""
    is_recorded = steps._is_recorded
    if not mode.is_recorded:
        steps._is_recorded = lambda model, device: False
    try:
        yield
    finally:
        steps._is_recorded = is_recorded


def same_bits(words: list[str]) -> dict[str, bool]:
    """Return for each kind of operations whether all processes come to the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *words, "--only-hash"],
                stdout=subprocess.PIPE,
                env=os.environ
                | {
                    "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{number}",
                    "TRITON_CACHE_DIR": f"{folder}/triton{number}",
                },
                text=True,
            )
            for number in range(NUM_PROCESSES)
        ]
        outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    found = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return {
        f"{name}_same_bits": len({lines[place][name] for lines in found}) == 1
        for place, name in enumerate(HASHED)
    }


def hash_after_training(mode: Mode, device: torch.device, arguments: argparse.Namespace) -> str:
    """Return a hash of the weights after some steps of the smallest batch."""
    arguments.batch_size, arguments.rounds = min(arguments.batch_sizes), 0
    trained = side(mode, device, arguments, [NUM_HASHED_STEPS])
    trained.run()
    digest = hashlib.sha256()
    for parameter in trained.model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
