"""What dropout costs a training step, and what it cost as a part of the compiled code.

    python benchmarks/dropout.py                        # tiny and small, CPU; minutes
    python benchmarks/dropout.py --config 222m          # on a GPU; random weights

One model four ways, in turns, in one process: without dropout (compiled), with dropout between
compiled parts (what a trial does), with dropout compiled in (each probability anew), and with
dropout uncompiled. Then a second probability comes, and the graphs that it compiles are counted.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch
from torch import Tensor

from benchmarks.command_line import device_parser_of
from benchmarks.figures import Figures
from benchmarks.setups import VLM_CONFIGS, make_texts
from benchmarks.sides import OurSide
from nanovlm.config.schema import TrainConfig
from nanovlm.models.compiled import Block, call_compiled, run_block, run_block_compiled
from nanovlm.models.vision_language_model import VisionLanguageModel

PARTS = "between compiled parts"
WHOLE = "compiled in"


def run_block_whole(block: Block, *arguments: Any) -> Tensor:
    """Call a block's compiled code, dropout and its probability included."""
    output: Tensor = call_compiled(run_block, block, *arguments)
    return output


WAYS: dict[str, tuple[float, Callable[..., Tensor]]] = {
    "without dropout": (0.0, run_block_compiled),
    PARTS: (0.1, run_block_compiled),
    WHOLE: (0.1, run_block_whole),
    "uncompiled": (0.1, run_block),
}
"""Probability, and how blocks are called."""


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = device_parser_of(__doc__)
    names = ["222m"] if on_gpu else ["tiny", "small"]
    parser.add_argument("--config", nargs="+", choices=VLM_CONFIGS, default=names)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 2, help="of a round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = Figures(arguments.json, torch=torch.__version__)
    for name in arguments.config:
        measure(name, arguments, figures.part(name))


def measure(name: str, arguments: argparse.Namespace, figures: Figures) -> None:
    """Print the speed of each way, and the graphs of a second probability."""
    sides = {way: make_side(name, arguments, *WAYS[way]) for way in WAYS}
    graphs = {way: side.run().num_graphs for way, side in sides.items()}
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, side in sides.items():
            speeds[way].append(side.run().speed)
    fastest = statistics.median(speeds["without dropout"])
    for way in WAYS:
        median = statistics.median(speeds[way])
        print(
            f"{name}: {way:24} {median:7.2f} samples/s, {median / fastest:.2f} of that without "
            f"dropout; {graphs[way]} graphs",
            flush=True,
        )
        figures.add(**{way: {"samples_per_second": median, "graphs": graphs[way]}})
    for way in (PARTS, WHOLE):
        run = make_side(name, arguments, 0.2, WAYS[way][1]).run()
        print(f"{name}: {way}: a second probability compiles {run.num_graphs} graphs", flush=True)
        figures.add(**{f"graphs of a second probability, {way}": run.num_graphs})


def make_side(
    name: str, arguments: argparse.Namespace, dropout: float, how: Callable[..., Tensor]
) -> OurSide:
    """Return a training that waits for its rounds; the first one is for warming up."""
    vlm = dataclasses.replace(VLM_CONFIGS[name], lm_dropout=dropout, vit_dropout=dropout)
    rounds = [arguments.steps] * (1 + arguments.rounds)
    config = TrainConfig(
        batch_size=arguments.batch_size,
        epochs=sum(rounds),
        cpu_threads=arguments.threads,
        vlm=vlm,
    )
    device = torch.device(arguments.device)
    with device:
        model = VisionLanguageModel(vlm, config.seed, compiled=True)
    model.vision_encoder.run_block = model.decoder.run_block = how
    texts = make_texts(vlm, 40 * arguments.batch_size // 12, 2 * arguments.batch_size)
    return OurSide(model, config, texts, device, rounds)


if __name__ == "__main__":
    main()
