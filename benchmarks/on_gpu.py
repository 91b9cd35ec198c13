"""All that a GPU can tell of this project, in some minutes and with one command.

    python benchmarks/on_gpu.py --minutes 10 --out FOLDER      # on a machine with a GPU; no network
    python benchmarks/on_gpu.py --rehearse --out FOLDER       # the same stages, tiny, on a CPU
    python benchmarks/on_gpu.py --stages device,tests --out FOLDER

The stages stand in the order of their worth. Each is a program of its own with a time box, its
share of the minutes; what one leaves over goes to those that follow. After each stage FOLDER holds
what has been found so far: `table.md` for people, `results.json` with all figures, `log.txt` with
what the stages have printed, and where they were when their time was over. Ends with 0 if all
stages were fine. Needs what the programs need, Ray included, and psutil.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from benchmarks.stage_runner import Outcome, run_stage, time_box
from nanovlm.files import replace_json, replace_text
from nanovlm.process import usable_cpus

BENCHMARKS = Path(__file__).parent.resolve()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A program and what of its figures is shown."""

    name: str
    share: float
    """Of the minutes; they come to 600, so that it is seconds of ten of them."""
    least_seconds: float
    """With less there is no point in starting it."""
    script: str
    on_gpu: str
    """Arguments."""
    rehearsal: str
    """Arguments for the tiny configuration on a CPU."""
    shown: tuple[str, ...] = ()
    """Path in the figures, with `*` for the only name there may be, and how it is shown; what is
    missing or None is left out."""
    is_compiled: bool = False
    """Takes --no-compile, for a machine that cannot compile."""
    takes_ceiling: bool = False
    """Takes --measured-tflops."""


TINY = "--device cpu --threads 1"
LARGE = f"--device cuda --config 222m --threads {min(16, usable_cpus())}"
CEILING = "bfloat16_product_tflops"

STAGES = (
    Stage(
        "device", 35, 15, "ceilings.py", "--device cuda", "--device cpu",
        ("card: {}", "packages.torch: torch {}", f"{CEILING}: {{:.3g}} TFLOP/s bf16",
         "float32_product_tflops: {:.3g} float32", "device_copy_gb_per_second: copy {:.4g} GB/s",
         "host_to_device_gb_per_second: from the host {:.3g}",
         "compile_obstacle: cannot compile: {}"),
        is_compiled=True,
    ),
    Stage(
        "tests", 95, 30, "gpu_tests.py", "--device cuda", "--device cpu",
        ("collected: {} tests", "passed: {} passed", "failed: {} failed", "skipped: {} skipped"),
    ),
    Stage(
        "training", 95, 50, "train_step.py", f"{LARGE} --rounds 3 --warmup-steps 6",
        f"{TINY} --config tiny --batch-size 8 --warmup-steps 2 --rounds 1 --steps 1",
        ("*.samples_per_second: {:.4g} samples/s", "*.peer_samples_per_second: peer {:.4g}",
         "*.ratio: ratio {:.2f}", "*.model_flops_utilization: MFU {:.1%}",
         "*.share_of_measured_product: {:.1%} of the measured product",
         "*.peak_memory_gb: {:.1f} GB", "*.peer_peak_memory_gb: peer {:.1f} GB",
         "*.data_wait_fraction: data wait {:.2%}", "*.warmup_seconds: warm-up {:.0f} s",
         "*.losses.*.largest_difference: losses within {:.1e}"),
        is_compiled=True, takes_ceiling=True,
    ),
    Stage(
        "profile", 40, 15, "profiles.py", f"{LARGE} --steps 3",
        f"{TINY} --config tiny --batch-size 8 --steps 1 --warmup-steps 1",
        ("plain_seconds_a_step: {:.4f} s a step", "host_seconds_a_step: host {:.4f} s",
         "kernels_a_step: {:.0f} kernels",
         "launches_a_step: {:.0f} launches", "gpu_idle_fraction: GPU idle {:.1%}"),
        is_compiled=True,
    ),
    Stage(
        "mmstar", 50, 30, "mmstar.py", f"{LARGE} --rounds 1 --peer-items 128 --no-compile",
        f"{TINY} --config tiny --items 32 --rounds 1 --no-compile",
        ("*.questions: {} questions", "*.never_stops.items_per_second: never stops {:.4g}/s",
         "*.never_stops.ratio: {:.1f} times the peer",
         "*.never_stops.least_equal: {:.2%} equal", "*.stops.items_per_second: stops {:.4g}/s",
         "*.stops.ratio: {:.1f} times the peer", "*.stops.least_equal: {:.2%} equal"),
    ),
    Stage(
        "search", 100, 40, "whole_search.py",
        "--config 222m --gpus 0.5 --concurrency 2 --trials 5 --halve --break",
        "--concurrency 2 --trials 5 --halve --break",
        ("seconds: {:.0f} s", "turnaround_seconds: turnaround {:.3f} s",
         "longest_turnaround_seconds: at most {:.3f} s", "memory_growth_gb: memory grew {:.3f} GB",
         "halved: halved: {}", "broken: a GPU failed: {}",
         "samples_per_second: {:.4g} samples/s each",
         "both_at_once_seconds: both trained for {:.1f} s",
         "seconds_to_first_step: first step after {:.1f} s"),
        is_compiled=True,
    ),
    Stage(
        "tiles", 60, 30, "tiled_step.py", "--device cuda --config 460m --rounds 3 --steps 2",
        f"{TINY} --batch-size 4 --rounds 1 --steps 1",
        ("useful_tokens_per_second: {:,.0f} useful tokens/s", "ratio: {:.2f} times a padded peer",
         "useful_share_of_peer: of whose tokens {:.0%} are useful",
         "peak_memory_gb: {:.1f} GB, both sides"),
    ),
    Stage(
        "frozen", 35, 20, "frozen_features.py", f"{LARGE} --rounds 3",
        f"{TINY} --config tiny --batch-size 4 --rounds 1 --steps 1 --no-compile",
        ("*.median: {:.2f} times with features from the disk",
         "*.images_per_second: {:.0f} images/s encoded",
         "*.largest_difference: losses within {:.1e}"),
        is_compiled=True,
    ),
    Stage(
        "modes", 55, 40, "training_modes.py", f"{LARGE} --rounds 2",
        f"{TINY} --config tiny --batch-sizes 8 --warmup-steps 1 --rounds 1 --steps 1 --no-compile",
        ("*.default: {:.4g} samples/s", "*.any_order: in any order {:.4g}",
         "*.single_launches: launched one by one {:.4g}",
         "default_same_bits: the same bits: {}", "any_order_same_bits: in any order: {}"),
        is_compiled=True,
    ),
    Stage(
        "start", 35, 25, "trial_start.py", f"{LARGE} --trials 2",
        f"{TINY} --config digits --trials 2 --compile",
        ("first_seconds: first trial {:.2f} s", "first_graphs: {} graphs",
         "later_seconds: later ones {:.3f} s", "later_graphs: {} graphs"),
        is_compiled=True,
    ),
)  # fmt: skip


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stage is left behind
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_stages(
        arguments.stages, out, arguments.minutes, arguments.rehearse, arguments.compile
    )
    print((out / "table.md").read_text(encoding="utf-8"))
    return int(any(outcome.ending != "fine" for outcome in outcomes))


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all stages together")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where this machine can",
    )
    parser.add_argument(
        "--stages", type=chosen, default=STAGES, help="some of them, by name or number: 1,tests"
    )
    return parser.parse_args()


def chosen(text: str) -> tuple[Stage, ...]:
    """Return the stages that `text` names, in their own order."""
    known = {stage.name: stage for stage in STAGES}
    known |= {str(number): stage for number, stage in enumerate(STAGES, start=1)}
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in known]:
        names = ", ".join(stage.name for stage in STAGES)
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}; there are {names}")
    wanted = {known[word].name for word in words}
    return tuple(stage for stage in STAGES if stage.name in wanted)


def run_stages(
    stages: Sequence[Stage], out: Path, minutes: float, rehearse: bool, compiled: bool = True
) -> list[Outcome]:
    """Run the stages, keep what is known in `out` all the while, and return what became of them."""
    outcomes: list[Outcome] = []
    started = time.monotonic()
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu", ignore_cleanup_errors=True) as temporary:
        workplace = Path(temporary)
        environment = stage_environment(workplace, rehearse)
        shares = [stage.share for stage in stages]
        for index, stage in enumerate(stages):
            box = time_box(shares, index, minutes * 60, time.monotonic() - started)
            device = next((o for o in outcomes if o.name == "device"), None)
            words = command(stage, rehearse, device, compiled)
            outcome = Outcome(1 + index, stage.name, words, box_seconds=box)
            outcomes.append(outcome)
            if box < stage.least_seconds:
                outcome.ending = "skipped"
            else:
                print(f"{outcome.number} {stage.name}: at most {box:.0f} s", flush=True)
                keep(outcomes, stages, out, minutes, rehearse)
                run_stage(outcome, log, workplace, environment)
            keep(outcomes, stages, out, minutes, rehearse)
            print(row(outcome, stage), *outcome.tail[-15:], sep="\n", flush=True)
    return outcomes


def command(
    stage: Stage, rehearse: bool, device: Outcome | None, compiled: bool = True
) -> list[str]:
    """Return the command line of a stage.

    Args:
        device: the first stage, if it was run; where it failed nothing is compiled, unless it
            found before that this machine can.
    """
    words = shlex.split(stage.rehearsal if rehearse else stage.on_gpu)
    found = {} if device is None else device.figures
    unknown = "failed" if device is not None and device.ending == "failed" else None
    if stage.is_compiled and (found.get("compile_obstacle", unknown) or not compiled):
        words.append("--no-compile")
    if stage.takes_ceiling and CEILING in found:
        words += ["--measured-tflops", str(found[CEILING])]
    return [sys.executable, str(BENCHMARKS / stage.script), *words]


def stage_environment(shared: Path, rehearse: bool) -> dict[str, str]:
    """Return the variables of all stages; compiled code and prepared data are shared by them."""
    paths = [str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),  # for Ray's workers too
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor"),
        "TRITON_CACHE_DIR": str(shared / "triton"),
        "HF_HOME": str(shared / "hub"),
        "HF_ASSETS_CACHE": str(shared / "assets"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "disabled",
    }
    return variables | ({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})


def keep(
    outcomes: Sequence[Outcome], stages: Sequence[Stage], out: Path, minutes: float, rehearse: bool
) -> None:
    """Write the table and the figures as they are now."""
    what = "rehearsal on a CPU" if rehearse else "on a GPU"
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    rows = [row(outcome, stage) for outcome, stage in zip(outcomes, stages, strict=False)]
    head = ["| | stage | | seconds (of) | |", "|---|---|---|---|---|"]
    title = f"{what}, {minutes:g} minutes, {now}"
    replace_text(out / "table.md", "\n".join([title, "", *head, *rows, ""]))
    content = {"what": what, "minutes": minutes, "written_at": now}
    stages_now = [dataclasses.asdict(outcome) for outcome in outcomes]
    replace_json(out / "results.json", {**content, "stages": stages_now})


def row(outcome: Outcome, stage: Stage) -> str:
    """Return a line of the table."""
    found = [text for line in stage.shown for text in shown(line, outcome.figures)]
    if outcome.ending == "failed":  # an exception's last line says what is wrong
        found.append(f"`{next((line for line in reversed(outcome.tail) if line.strip()), '')}`")
    times = f"{outcome.seconds:.1f} ({outcome.box_seconds:.0f})"
    cells = [str(outcome.number), stage.name, outcome.ending, times, ", ".join(found)]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def shown(line: str, figures: Mapping[str, Any]) -> list[str]:
    """Return a figure as text, as often as it is there; see `Stage.shown`."""
    path, _, form = line.partition(": ")
    found: list[Any] = [figures]
    for name in path.split("."):
        inside = [value for value in found if isinstance(value, Mapping)]
        if name == "*":
            found = [value for mapping in inside for value in mapping.values()]
        else:
            found = [mapping[name] for mapping in inside if name in mapping]
    return [form.format(value) for value in found if value is not None]


if __name__ == "__main__":
    sys.exit(main())
