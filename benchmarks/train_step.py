"""Training steps of this project against a plain loop over transformers' modules.

    python benchmarks/train_step.py                             # tiny and small, CPU; minutes
    python benchmarks/train_step.py --config 222m               # on a GPU; random weights
    python benchmarks/train_step.py --json figures.json         # and keep the figures

Both sides train the same model with the same initial weights on the same samples, in turns, in
one process. It needs torch, transformers, safetensors, numpy, pillow and pydantic.

(a) The peer (`peer.py`) does what nanoVLM v0.1 does: texts are padded on the left to 79 tokens, so
that each line has 128 with the image, logits are computed at all positions, `loss.item()` is read
each step, and on CUDA the pass runs under bf16 autocast. A text over 79 tokens is cut to its last
79 and carries no label, yet costs as much as the others. The peer is spared everything around the
step: its batches are made before the clock starts, as loader workers that keep up would do.
v0.1 compiles its model by default; `--peer-compile` does so here.

(b) This project runs `nanovlm.training.loop.train` as a trial does, batches included. Texts over
79 tokens were left out when the data was prepared, so that all samples of its steps are useful.

What is compared are useful samples a second, those that carry a label. On the lengths of
`setups.py` 60 % of (a)'s samples do.

After that, the losses are held against each other over some steps on the useful samples alone,
with the peer's padding on the right, where it moves no position: in v0.1's own layout the text's
distance from the image depends on the padding, so its loss differs in principle. Both sides then
take a constant learning rate and do not clip.

Where the peer's batch does not fit into the memory of the GPU it takes half of it, a quarter, ...
"""

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch
import transformers

from benchmarks.agreement import check_agreement
from benchmarks.command_line import model_runs, models_parser_of
from benchmarks.figures import Figures
from benchmarks.peer import Peer
from benchmarks.setups import VLM_CONFIGS, Texts, make_texts
from benchmarks.sides import OurSide, PeerSide, Run
from nanovlm.config.schema import TrainConfig
from nanovlm.messages import Speed
from nanovlm.models.vision_language_model import VisionLanguageModel

USEFUL_BATCHES = 8
"""Size of the data in our batches."""
MAX_IMAGES = 512
CPU_CHECK_BATCH = 8
"""Samples of a step of the check in float32, where the benchmark itself runs in bfloat16."""


def main() -> None:
    arguments = parse_arguments()
    for name, device, figures in model_runs(arguments, transformers):
        measure(name, arguments, device, figures)


def parse_arguments() -> argparse.Namespace:
    parser = models_parser_of(__doc__)
    parser.add_argument("--batch-size", type=int, help="32; 256 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, help="of our side; auto as a user has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a round; 2, and 10 on a GPU")
    parser.add_argument(
        "--warmup-steps", type=int, help="before the rounds; 2, and 20 where our side is compiled"
    )
    parser.add_argument("--peer-compile", action="store_true")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--measured-tflops", type=float, help="of a large product here (`ceilings.py`)"
    )
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.batch_size = arguments.batch_size or (256 if on_gpu else 32)
    arguments.steps = arguments.steps or (10 if on_gpu else 2)
    arguments.warmup_steps = arguments.warmup_steps or (20 if arguments.compile else 2)
    return arguments


def measure(
    name: str, arguments: argparse.Namespace, device: torch.device, figures: Figures
) -> None:
    """Time both sides on one configuration and hold their losses against each other."""
    config = train_config(name, arguments)
    texts = training_texts(config)
    print(
        f"\n{name}: batch_size={config.batch_size}, micro_batch_size={config.micro_batch_size}, "
        f"compile={config.compile}, peer compiled: {arguments.peer_compile}"
    )
    figures.add(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        compile=config.compile,
        peer_compile=arguments.peer_compile,
    )
    fitting = run_rounds(config, texts, device, arguments, figures)
    release(device)
    if arguments.check:
        config = dataclasses.replace(config, batch_size=fitting)
        check(config, texts, device, figures.part("losses"))


def train_config(name: str, arguments: argparse.Namespace) -> TrainConfig:
    rounds = round_steps(arguments)
    return TrainConfig(
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size or "auto",
        epochs=-(-sum(rounds) // USEFUL_BATCHES),
        compile=arguments.compile,
        cpu_threads=arguments.threads,
        vlm=VLM_CONFIGS[name],
    )


def round_steps(arguments: argparse.Namespace) -> list[int]:
    """Return the steps of each round: warm-up, and those that count."""
    return [arguments.warmup_steps, *[arguments.steps] * arguments.rounds]


def training_texts(config: TrainConfig) -> Texts:
    """Return samples of which `USEFUL_BATCHES` batches fit into the model's length."""
    num_useful = USEFUL_BATCHES * config.batch_size
    num_samples = 20 * -(-num_useful // 12)  # 12 of 20 fit
    return make_texts(config.vlm, num_samples, min(num_useful, MAX_IMAGES))


def check(config: TrainConfig, texts: Texts, device: torch.device, figures: Figures) -> None:
    """Print the losses of both sides, which agree; on a GPU also in float32 on the CPU.

    Raises AssertionError if they do not.
    """
    fitting = texts.fitting(config.vlm.max_text_length)
    small = dataclasses.replace(config, batch_size=CPU_CHECK_BATCH, compile=False)
    cpu = [("cpu", small, torch.device("cpu"))] if device.type == "cuda" else []
    for what, one_config, one_device in [(device.type, config, device), *cpu]:
        losses = check_agreement(one_config, fitting, one_device)
        pairs = zip(losses.ours, losses.peer, strict=True)
        largest = max(losses.differences())
        print(
            f"losses on {what}, ours and the peer's: "
            + ", ".join(f"{ours:.6f} {peer:.6f}" for ours, peer in pairs)
            + f"; relative difference {losses.differences()[0]:.1e} at the first step, "
            f"at most {largest:.1e}",
            flush=True,
        )
        figures.add(**{what: {**losses._asdict(), "largest_difference": largest}})
        release(device)


def run_rounds(
    config: TrainConfig,
    texts: Texts,
    device: torch.device,
    arguments: argparse.Namespace,
    figures: Figures,
) -> int:
    """Warm both sides up, let them run in turns, and report after each round.

    Returns the batch size that fits into the memory on both sides.
    """
    rounds = round_steps(arguments)
    with device:
        model = VisionLanguageModel(config.vlm, config.seed, config.compile)
    peer = Peer(config.vlm)  # not on the device until our memory there has been measured
    peer.copy_weights(model)
    our_side = OurSide(model, config, texts, device, rounds)
    warm_up = our_side.run()
    figures.add(warmup_seconds=warm_up.seconds, graphs=warm_up.num_graphs)
    allocated = allocated_bytes(device)
    peer.to(device)
    peer_side, peer_warm_up = warm_peer(peer, config, texts, device, arguments)
    print(
        f"warm-up: {warm_up.seconds:.1f} s ({warm_up.num_graphs} graphs), "
        f"peer {peer_warm_up.seconds:.1f} s ({peer_warm_up.num_graphs} graphs)",
        flush=True,
    )
    if device.type == "cuda":
        peaks = warm_up.peak_bytes / 1e9, (peer_warm_up.peak_bytes - allocated) / 1e9
        print("peak memory: {:.1f} GB, peer {:.1f} GB".format(*peaks))
        figures.add(peak_memory_gb=peaks[0], peer_peak_memory_gb=peaks[1])
    figures.add(peer_batch_size=peer_side.batch_size, peer_warmup_seconds=peer_warm_up.seconds)
    ours, theirs = [], []
    for number in range(1, arguments.rounds + 1):
        ours.append(our_side.run())
        theirs.append(peer_side.run())
        speeds = f"{ours[-1].speed:.2f}, peer {theirs[-1].speed:.2f}"
        graphs = ours[-1].num_graphs + theirs[-1].num_graphs
        compiled = f"; {graphs} graphs were compiled: more --warmup-steps" if graphs else ""
        print(f"round {number}: {speeds} useful samples/s{compiled}", flush=True)
        figures.add(**summary(ours, theirs, our_side.speeds[1:], arguments.measured_tflops))
    report(summary(ours, theirs, our_side.speeds[1:], arguments.measured_tflops))
    return peer_side.batch_size


def warm_peer(
    peer: Peer,
    config: TrainConfig,
    texts: Texts,
    device: torch.device,
    arguments: argparse.Namespace,
) -> tuple[PeerSide, Run]:
    """Return the peer after its warm-up, at the largest half, quarter, ... of the batch that fits
    into the memory of the GPU."""
    size = config.batch_size
    rounds, compiled = round_steps(arguments), arguments.peer_compile
    while True:
        peer_config = dataclasses.replace(config, batch_size=size)
        side = PeerSide(peer, peer_config, texts, device, rounds, compiled)
        try:
            return side, side.run()
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        del side
        peer.zero_grad()
        release(device)
        print(f"peer: out of GPU memory with {size} samples", flush=True)
        size //= 2


def summary(
    ours: Sequence[Run], theirs: Sequence[Run], speeds: Sequence[Speed], ceiling: float | None
) -> dict[str, float | None]:
    """Return what the rounds so far come to.

    Args:
        speeds: of our rounds, by the meter of the training loop.
        ceiling: TFLOP/s that a large product reached on this device.
    """
    our_median = statistics.median(run.speed for run in ours)
    peer_median = statistics.median(run.speed for run in theirs)
    tflops = statistics.median(speed.model_tflops_per_second for speed in speeds)
    shares = [s.model_flops_utilization for s in speeds if s.model_flops_utilization]
    return {
        "samples_per_second": our_median,
        "peer_samples_per_second": peer_median,
        "ratio": our_median / peer_median,
        "model_tflops_per_second": tflops,
        "model_flops_utilization": statistics.median(shares) if shares else None,
        "share_of_measured_product": tflops / ceiling if ceiling else None,
        "data_wait_fraction": max(speed.data_wait_fraction for speed in speeds),
        "rounds": len(ours),
        "graphs_in_rounds": sum(run.num_graphs for run in [*ours, *theirs]),
    }


def report(found: Mapping[str, float | None]) -> None:
    """Print the medians and their ratio, and what else was measured."""
    print(
        "median: {samples_per_second:.2f}, peer {peer_samples_per_second:.2f} useful samples/s; "
        "ratio {ratio:.2f}\n"
        "our data wait: at most {data_wait_fraction:.2%} of a round".format_map(found)
    )
    if found["model_flops_utilization"] is not None:
        print("our model FLOP utilisation: {model_flops_utilization:.1%}".format_map(found))
    if found["share_of_measured_product"] is not None:
        print("of a measured product: {share_of_measured_product:.1%}".format_map(found))


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
