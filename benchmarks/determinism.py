"""What it costs that training repeats to the bit, and whether it does.

    python benchmarks/determinism.py                   # the tiny configuration, on the CPU
    python benchmarks/determinism.py --config 222m     # on a GPU

First the same model trains in turns with operations that may sum in any order, which on a GPU is
torch's default, and with deterministic ones. Then two further processes, each with compiled code
of its own, take the same steps in either mode: printed is whether their weights are the same bits.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch

from benchmarks.figures import Figures
from benchmarks.setups import VLM_CONFIGS
from benchmarks.sides import OurSide
from benchmarks.train_step import train_config, training_texts
from nanovlm.config import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel

NUM_PROCESSES = 2
MODES = {"deterministic": True, "any_order": False}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    config = train_config(arguments.config, arguments)
    device = torch.device(arguments.device)
    if arguments.only_hash:
        for name, is_deterministic in MODES.items():
            found = {name: hash_after_training(config, device, arguments.steps, is_deterministic)}
            print(json.dumps(found), flush=True)
        return
    figures = Figures(arguments.json, config=arguments.config, batch_size=config.batch_size)
    figures.add(**speeds(config, device, arguments, figures))
    figures.add(**same_bits(sys.argv[1:]))
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=VLM_CONFIGS, default="222m" if on_gpu else "tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--batch-size", type=int, help="32; 256 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, help="auto as a user has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--warmup-steps", type=int, default=6)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only-hash", action="store_true", help="what the further processes do")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (256 if arguments.device == "cuda" else 32)
    return arguments


def speeds(
    config: TrainConfig, device: torch.device, arguments: argparse.Namespace, figures: Figures
) -> dict[str, float]:
    """Return the samples a second of both modes, and the share that the deterministic one keeps."""
    rounds = [arguments.warmup_steps, *[arguments.steps] * arguments.rounds]
    texts = training_texts(config)
    sides = {}
    for name, is_deterministic in MODES.items():
        with device:
            model = VisionLanguageModel(config.vlm, config.seed, config.compile)
        config = dataclasses.replace(config, deterministic=is_deterministic)
        sides[name] = OurSide(model, config, texts, device, rounds)
        warm_up = sides[name].run()
        figures.add(**{f"{name}_warmup_seconds": warm_up.seconds})
    seen = [{name: side.run().speed for name, side in sides.items()} for _ in rounds[1:]]
    medians = {name: statistics.median(found[name] for found in seen) for name in sides}
    return {
        **{f"{name}_samples_per_second": speed for name, speed in medians.items()},
        "deterministic_ratio": medians["deterministic"] / medians["any_order"],
    }


def same_bits(words: list[str]) -> dict[str, bool]:
    """Return for each mode whether all processes come to the same weights."""
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
        for place, name in enumerate(MODES)
    }


def hash_after_training(
    config: TrainConfig, device: torch.device, num_steps: int, is_deterministic: bool
) -> str:
    """Return a hash of the weights after some steps."""
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
    config = dataclasses.replace(config, deterministic=is_deterministic)
    OurSide(model, config, training_texts(config), device, [num_steps]).run()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
