"""Training with a frozen vision encoder: its output from the disk against computed in each pass.

    python benchmarks/frozen_features.py                        # tiny and small, CPU; two minutes
    python benchmarks/frozen_features.py --config 222m          # on a GPU; random weights

Both sides run `nanovlm.training.loop.train` on the same samples with the same weights, in turns, in
one process; the file is in the page cache, as it is from the second epoch on where the memory has
room for it. Beside the speed: how long the file took to make, by its images a second, how large it
is, and by how much the losses of both sides differ.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch

from benchmarks.command_line import model_runs, models_parser_of
from benchmarks.figures import Figures
from benchmarks.setups import VLM_CONFIGS, make_texts
from nanovlm.config.schema import TrainConfig
from nanovlm.files import gib
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import choose_algorithms
from nanovlm.training.frozen_features import frozen_features
from nanovlm.training.loop import train


def main() -> None:
    arguments = parse_arguments()
    for name, device, figures in model_runs(arguments):
        measure(name, arguments, device, figures)


def parse_arguments() -> argparse.Namespace:
    parser = models_parser_of(__doc__)
    parser.add_argument("--batch-size", type=int, help="32; 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (256 if arguments.device == "cuda" else 32)
    return arguments


def measure(
    name: str, arguments: argparse.Namespace, device: torch.device, figures: Figures
) -> None:
    """Make the file, then time both sides in turns after a round each that does not count."""
    num_steps = (arguments.rounds + 1) * arguments.steps
    config = TrainConfig(
        batch_size=arguments.batch_size, epochs=10**6, freeze="vision_encoder",
        compile=arguments.compile, vlm=VLM_CONFIGS[name],
    )  # fmt: skip
    texts = make_texts(config.vlm, 20 * arguments.batch_size, 4 * arguments.batch_size)
    samples = texts.fitting(config.vlm.max_text_length).prepared()
    choose_algorithms(config, device)
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
        other = VisionLanguageModel(config.vlm, config.seed, config.compile)
    started = time.perf_counter()
    key = f"benchmark {time.time_ns()}"  # so that it is made anew
    features = frozen_features(model, samples.images, key, device, lambda progress: None)
    seconds = time.perf_counter() - started
    size = features.numel() * features.element_size()
    print(
        f"\n{name}: {len(features)} images in {seconds:.1f} s, {len(features) / seconds:.0f} a "
        f"second; {gib(size)}, {size // len(features) / 1e3:.0f} kB an image"
    )
    ends = [(step + 1) * config.batch_size for step in range(num_steps)]
    cached = dataclasses.replace(samples, images=features)
    sides = [
        train(model, cached, config, ends, device=device),
        train(other, samples, config, ends, device=device),
    ]
    speedups, differences = [], []
    for number in range(arguments.rounds + 1):
        seconds_of, losses = [], []
        for side in sides:
            started = time.perf_counter()
            losses.append([next(side).train_loss for _ in range(arguments.steps)])
            seconds_of.append(time.perf_counter() - started)
        differences += [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
        if number:
            speedups.append(seconds_of[1] / seconds_of[0])
            speeds = [arguments.steps * config.batch_size / s for s in seconds_of]
            print(
                f"round {number}: {speeds[0]:.1f} samples/s from the disk, {speeds[1]:.1f} "
                f"computed: {speedups[-1]:.2f} times",
                flush=True,
            )
    print(
        f"median {statistics.median(speedups):.2f} times; losses differ by at most "
        f"{max(differences):.1e}"
    )
    figures.add(
        speedups=speedups,
        median=statistics.median(speedups),
        images_per_second=len(features) / seconds,
        bytes_per_image=size // len(features),
        largest_difference=max(differences),
    )


if __name__ == "__main__":
    main()
