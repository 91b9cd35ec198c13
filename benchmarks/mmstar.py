"""Asking a model all questions: this project against nanoVLM v0.1's way, on the same questions.

    python benchmarks/mmstar.py                        # tiny and small, CPU, some dozen questions
    python benchmarks/mmstar.py --config 222m          # on a GPU; 1,500 questions, random weights

v0.1's way: 32 questions a batch, in the benchmark's order, padded on the left to the longest of
them; float32; the image is encoded once, and each of five tokens takes a pass of the decoder over
the whole sequence, without a cache. Here it is built from transformers' modules (`peer.py`), so it
is a second opinion on every answer as well. In three things it is not v0.1's: it decodes greedily,
cuts at EOS, and lets positions count real tokens only; otherwise answers would depend on chance and
on the other questions of a batch, and there would be nothing to compare.

Our side is `evaluate_mmstar` as a trial calls it, after one evaluation that is not counted.

Two models are asked. `stops` has been trained until it answers with one letter and EOS, as a model
does that is worth evaluating. `never stops` has random weights and goes on until it is cut off,
which is the most work that an evaluation can be. What v0.1's way costs is the same for both.
The prompts' lengths are `question_lengths` of `setups.py`.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch
import transformers
from tokenizers import Tokenizer
from torch.nn import functional as F

from benchmarks.command_line import model_runs, models_parser_of
from benchmarks.figures import Figures
from benchmarks.peer import Peer
from benchmarks.questions import make_benchmark, make_tokenizer, stopping_model
from benchmarks.reference_answers import reference_answers
from benchmarks.setups import VLM_CONFIGS
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.evaluation.mmstar_result import ItemAnswer, MMStarResult
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import has_bfloat16

NUM_ITEMS = {"tiny": 192, "small": 96, "222m": 1500}
REQUIRED_EQUAL = 0.99
"""Share of equal answers below which the benchmark fails. Not 1: random weights put some tokens so
close together that float32 decides between them by the order of a sum. Where our side computes in
bfloat16, on GPUs, that decides so often that nothing is asked of random weights."""


def main() -> None:
    arguments = parse_arguments()
    for name, device, figures in model_runs(arguments, transformers):
        measure(name, arguments, device, figures)


def parse_arguments() -> argparse.Namespace:
    parser = models_parser_of(__doc__)
    parser.add_argument("--items", type=int, help="questions; 1500 for 222m, fewer for the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-items", type=int, help="ask the peer so many of them, evenly chosen"
    )
    parser.add_argument("--batch-size", type=int, help="mmstar_batch_size of our side; auto")
    return parser.parse_args()


def measure(
    name: str, arguments: argparse.Namespace, device: torch.device, figures: Figures
) -> None:
    """Ask both models of one configuration in both ways; fail if too few answers are equal."""
    vlm = VLM_CONFIGS[name]
    tokenizer = make_tokenizer(vlm)
    benchmark = make_benchmark(vlm, arguments.items or NUM_ITEMS[name])
    lengths = benchmark.offsets.diff().float()
    print(
        f"\n{name}: {len(benchmark)} questions, prompts of {lengths.mean():.0f} tokens on average "
        f"and {int(lengths.max())} at most; compile={arguments.compile}"
    )
    figures.add(questions=len(benchmark))
    with device:
        model = VisionLanguageModel(vlm, compiled=arguments.compile)
    never, stops = figures.part("never_stops"), figures.part("stops")
    random_share = compare("never stops", model, benchmark, tokenizer, arguments, device, never)
    stopping_model(model, tokenizer, device)
    share = compare("stops", model, benchmark, tokenizer, arguments, device, stops)
    required = [share] if has_bfloat16(device) else [share, random_share]
    assert min(required) >= REQUIRED_EQUAL, "the answers differ"


def compare(
    what: str,
    model: VisionLanguageModel,
    benchmark: PreparedBenchmark,
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    device: torch.device,
    figures: Figures,
) -> float:
    """Print items/s of both ways, asked in turns; return the share of answers that are equal."""
    with device:
        peer = Peer(model.config)
    peer.copy_weights(model)

    size: int | Literal["auto"] = arguments.batch_size or "auto"
    fewer = evenly_chosen(benchmark, arguments.peer_items or len(benchmark))

    def ours() -> MMStarResult:
        return evaluate_mmstar(model, benchmark, tokenizer, size, device)

    def theirs() -> MMStarResult:
        return MMStarResult.of(fewer, reference_answers(peer, fewer, tokenizer, device))

    first_seconds, _ = timed(ours, device)
    ours_seconds, theirs_seconds = [], []
    for _ in range(arguments.rounds):
        seconds, result = timed(ours, device)
        ours_seconds.append(seconds)
        seconds, reference = timed(theirs, device)
        theirs_seconds.append(seconds)
    our_median, their_median = map(statistics.median, (ours_seconds, theirs_seconds))
    speed, their_speed = len(benchmark) / our_median, len(fewer) / their_median
    print(
        f"{what}: {speed:.1f} items/s, v0.1's way {their_speed:.1f} items/s; "
        f"ratio {speed / their_speed:.1f}; {our_median:.2f} s (the first time "
        f"{first_seconds:.2f} s) and {their_median:.2f} s for {len(fewer)} items"
    )
    figures.add(
        items_per_second=speed,
        peer_items_per_second=their_speed,
        peer_items=len(fewer),
        ratio=speed / their_speed,
        seconds=our_median,
        first_seconds=first_seconds,
    )
    return report_answers(answers_to(fewer, result), reference, figures)


def evenly_chosen(benchmark: PreparedBenchmark, number: int) -> PreparedBenchmark:
    """Return `number` questions of the benchmark, at equal distances."""
    places = torch.linspace(0, len(benchmark) - 1, number).round().long()
    prompts = [benchmark.prompt(place) for place in places.tolist()]

    def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[place] for place in places.tolist())

    return dataclasses.replace(
        benchmark,
        slots=benchmark.slots.take(places),
        tokens=torch.cat(prompts).int(),
        offsets=F.pad(torch.tensor([len(prompt) for prompt in prompts]).cumsum(0), (1, 0)),
        answers=chosen(benchmark.answers),
        categories=chosen(benchmark.categories),
        l2_categories=chosen(benchmark.l2_categories),
        indices=chosen(benchmark.indices),
    )


def answers_to(benchmark: PreparedBenchmark, result: MMStarResult) -> MMStarResult:
    """Return those parts of `result`, about more questions, that are about `benchmark`."""
    place = {index: place for place, index in enumerate(result.indices)}
    given = [
        ItemAnswer(result.outputs[i], result.letters[i], result.letter_nlls[i])
        for i in (place[index] for index in benchmark.indices)
    ]
    return MMStarResult.of(benchmark, given)


def report_answers(result: MMStarResult, reference: MMStarResult, figures: Figures) -> float:
    """Print how many answers are equal, item by item; return the least share of a part."""
    parts = {
        "outputs": share_equal(result.outputs, reference.outputs),
        "letters": share_equal(result.letters, reference.letters),
        "right or wrong": share_equal(result.correct, reference.correct),
    }
    nlls = zip(result.letter_nlls, reference.letter_nlls, strict=True)
    largest = max(abs(a - b) for a, b in nlls)
    print(
        "  equal item by item: "
        + ", ".join(f"{name} {share:.2%}" for name, share in parts.items())
        + f"; letter_nll differs by at most {largest:.1e}; "
        f"accuracy {result.accuracy:.4f} and {reference.accuracy:.4f}",
        flush=True,
    )
    least = min(parts.values())
    figures.add(equal=parts, least_equal=least, largest_nll_difference=largest)
    return least


def share_equal(ours: Sequence[object], theirs: Sequence[object]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def timed(ask: Callable[[], MMStarResult], device: torch.device) -> tuple[float, MMStarResult]:
    """Return the seconds that `ask` takes, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = ask()  # the answers are on the host, so the device is done
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
