"""From the start of a trial to the end of its first optimizer step, in one warm worker.

    python benchmarks/trial_start.py                   # the digits preset, on the CPU
    python benchmarks/trial_start.py --config 222m     # on a GPU; about two minutes

Runs several trials with other learning rates and seeds in one process, as a worker of a search
does, each up to its first report, which comes after its first step. The first trial has everything
to make: data, model, compiled code. The later ones should find it.

`222m` asks about digits, at 224 pixels, so that it needs no hub, and starts from backbones in a
temporary folder that are as large as the published ones. The graphs that torch.compile has made are
counted for each trial.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from torch._dynamo.utils import counters

from benchmarks.command_line import device_parser_of
from benchmarks.figures import Figures
from benchmarks.peer import Peer
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import load_config
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.trial import run_trial


class Start(NamedTuple):
    """How one trial started."""

    seconds: float
    """To the end of the first optimizer step."""
    num_graphs: int
    """Graphs that were compiled, for the evaluation after the step as well."""
    evaluation_seconds: float
    """After it."""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        config = trial_config(arguments, Path(folder))
        resources = Resources(arguments.device)
        print(f"{arguments.config} on {resources.device}, compile={config.compile}")
        figures = Figures(arguments.json, device=str(resources.device), compile=config.compile)
        starts: list[Start] = []
        for number in range(arguments.trials):
            starts.append(start_trial(number, config, resources))
            print(
                f"trial {number}: {starts[-1].seconds:.3f} s, {starts[-1].num_graphs} graphs",
                flush=True,
            )
            figures.add(trials=[start._asdict() for start in starts])
    later = starts[1:]
    seconds = [start.seconds for start in later]
    figures.add(
        first_seconds=starts[0].seconds,
        first_graphs=starts[0].num_graphs,
        later_seconds=statistics.median(seconds),
        later_graphs=sum(start.num_graphs for start in later),
    )
    print(
        f"first trial {starts[0].seconds:.2f} s; later ones: "
        f"median {statistics.median(seconds):.3f} s, max {max(seconds):.3f} s, "
        f"{sum(start.num_graphs for start in later)} graphs"
    )


def parse_arguments() -> argparse.Namespace:
    parser = device_parser_of(__doc__)
    parser.add_argument("--config", choices=["digits", "222m"], default="digits")
    parser.add_argument("--threads", type=int, help="cpu_threads; the preset's by default")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--batch-size", type=int, help="the preset's by default")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the preset's by default"
    )
    arguments = parser.parse_args()
    if arguments.trials < 2:
        parser.error("--trials must be at least 2: the first one is not warm")
    return arguments


def trial_config(arguments: argparse.Namespace, folder: Path) -> TrainConfig:
    """Return what the trials have in common; backbones are written to `folder` if they need any."""
    if arguments.config == "digits":
        config = load_config(None, "digits", {})
    else:
        vlm = write_backbones(folder)
        config = TrainConfig(
            train_dataset_path="builtin:digits",
            train_dataset_name=("default",),
            test_dataset_path="builtin:digits",
            vlm=vlm,
        )
    changes = {
        "batch_size": arguments.batch_size,
        "compile": arguments.compile,
        "cpu_threads": arguments.threads,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)


def write_backbones(folder: Path) -> VLMConfig:
    """Write random backbones in the published form; return nanoVLM-222M that starts from them."""
    vlm = VLMConfig(
        vit_model_type=str(folder / "vision"),
        lm_model_type=str(folder / "decoder"),
        lm_tokenizer="builtin:digits",
    )
    peer = Peer(vlm)
    peer.vision_encoder.save_pretrained(vlm.vit_model_type)
    peer.decoder.save_pretrained(vlm.lm_model_type)
    return vlm


def start_trial(number: int, config: TrainConfig, resources: Resources) -> Start:
    """Run a trial up to its first report."""
    config = dataclasses.replace(config, lr_mp=config.lr_mp * 0.9**number, seed=number)
    job = Job(trial_id=f"trial_{number}", config=config, milestones=(config.batch_size,))
    before = num_graphs()
    trial = run_trial(job, resources)
    report = next(trial)
    trial.close()
    return Start(report.first_step_seconds, num_graphs() - before, report.evaluation_seconds)


def num_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    main()
