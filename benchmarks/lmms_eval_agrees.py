"""The project's MMStar figure against lmms-eval's, item by item, on 1,500 made-up questions.

    python benchmarks/lmms_eval_agrees.py            # in an environment that has lmms-eval too

How to make one is in docs/howto.md. The data is that of `made_up_mmstar.py`. A small model learns
it for some minutes, and is saved. Then lmms-eval answers its own task `mmstar`, whose data alone is
replaced, through its command line; and so does `evaluate_mmstar`, as a trial calls it.

Ways of asking: with lmms-eval's prompt, as its command does unless told otherwise; with that
prompt, and answers of the length that the project reads; with the project's own prompt, and such
answers. Under each, both sides read the same text and pixels. Where both read as much of an answer,
all answers and all verdicts have to be equal. Last, the project's figure as it stands: it puts
transparent images on white, and lmms-eval's task drops their transparency. All others have to be
equal there too.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import datasets
import lmms_eval
import torch
from pyarrow import parquet
from torch.nn import functional as F

from benchmarks.command_line import device_parser_of
from benchmarks.figures import Figures
from benchmarks.made_up_mmstar import (
    VOCABULARY,
    has_transparency,
    write_benchmark,
    write_tokenizer,
    write_training_data,
)
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import load_config
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.images import resize_to_uint8
from nanovlm.data.text import encode, training_prompt
from nanovlm.evaluation.lmms_eval import MODEL_ID
from nanovlm.evaluation.mmstar import evaluate_mmstar, num_new_tokens
from nanovlm.evaluation.mmstar_result import MMStarResult
from nanovlm.messages import Job
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from nanovlm.trial import run_trial

BATCH_SIZE = 32
SUFFIX = "\nAnswer with the option's letter from the given choices directly"
"""What lmms-eval's task adds to a question; checked against the texts that it logs."""


def main() -> None:
    parser = device_parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="folder for data and model, kept if it is given")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    figures = Figures(arguments.json, device=arguments.device, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        config = prepare(folder, arguments.epochs, arguments.device)
        compare_all(folder, config, arguments.device, figures)


def prepare(folder: Path, epochs: int, device: str) -> TrainConfig:
    """Write data and tokenizer and train the model, unless they are there."""
    values: dict[str, Any] = {
        "train_dataset_path": str(folder / "training"),
        "test_dataset_path": str(folder / "benchmark"),
        "lr_mp": 5e-3,
        "lr_backbones": 2e-3,
        "epochs": epochs,
        "vlm.lm_tokenizer": str(folder / "tokenizer"),
        "vlm.lm_eos_token_id": 0,
        "vlm.lm_vocab_size": VOCABULARY,
        "vlm.lm_max_length": 96,
        "vlm.lm_max_position_embeddings": 512,
        "vlm.lm_re_base": 10_000,
    }
    if not (folder / "model").exists():
        write_benchmark(folder / "benchmark")
        write_training_data(folder / "training")
        write_tokenizer(folder / "tokenizer")
        config = load_config(None, "digits", values)
        job = Job(trial_id="model", config=config, output_dir=str(folder / "model"))
        for report in run_trial(job, Resources(device)):
            print(f"trained: mmstar_accuracy {report.metrics['mmstar_accuracy']:.4f}", flush=True)
    return load_config(None, "digits", values)


def compare_all(folder: Path, config: TrainConfig, device: str, figures: Figures) -> None:
    resources = Resources(device)
    tokenizer = resources.tokenizer(config.vlm)
    benchmark = resources.benchmark(config)
    model = VisionLanguageModel.from_pretrained(folder / "model").to(device)
    file = folder / "benchmark" / "mmstar.parquet"
    texts = [
        training_prompt(question.strip() + SUFFIX)
        for question in parquet.read_table(file, columns=["question"])["question"].to_pylist()
    ]
    same_pixels = without_transparency(benchmark, file)
    same_prompt = with_prompts(same_pixels, encode(tokenizer, texts))
    short = f"max_new_tokens={num_new_tokens(tokenizer, 'ABCD')}"

    def ours(asked: PreparedBenchmark) -> MMStarResult:
        return evaluate_mmstar(model, asked, tokenizer, BATCH_SIZE, torch.device(device))

    def theirs(prompt: str, suffix: str, gen_kwargs: str) -> list[dict[str, Any]]:
        task = write_task(folder, file, suffix)
        return ask_lmms_eval(folder, task, prompt, gen_kwargs, device)

    part = figures.part
    compare("its prompt, its length", ours(same_prompt), theirs("training", SUFFIX, ""), part)
    its_prompt = theirs("training", SUFFIX, short)
    texts_equal = compare("its prompt, our length", ours(same_prompt), its_prompt, part)
    assert texts_equal == (len(benchmark), len(benchmark)), "answers differ"
    our_prompt = theirs("mmstar", "", short)
    texts_equal = compare("our prompt, our length", ours(same_pixels), our_prompt, part)
    assert texts_equal == (len(benchmark), len(benchmark)), "answers differ"
    opaque = [i for i, index in enumerate(benchmark.indices) if not has_transparency(index)]
    as_it_stands = ours(benchmark)
    compare("our figure as it stands", as_it_stands, our_prompt, part)
    texts_equal = compare("its opaque images alone", as_it_stands, our_prompt, part, opaque)
    assert texts_equal == (len(opaque), len(opaque)), "answers differ"


def without_transparency(benchmark: PreparedBenchmark, file: Path) -> PreparedBenchmark:
    """Return the benchmark with the pixels that lmms-eval's task hands over."""
    images = benchmark.images.clone()
    rows = datasets.Dataset.from_parquet(str(file))
    for item, index in enumerate(benchmark.indices):
        if has_transparency(index):
            image = rows[item]["image"].convert("RGB")
            pixels = resize_to_uint8(image, images.shape[-1], "bilinear")
            images[benchmark.slots.index[item]] = torch.from_numpy(pixels)
    return dataclasses.replace(benchmark, images=images)


def with_prompts(benchmark: PreparedBenchmark, prompts: Sequence[list[int]]) -> PreparedBenchmark:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return dataclasses.replace(
        benchmark,
        tokens=torch.tensor([token for prompt in prompts for token in prompt]).int(),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
    )


def write_task(folder: Path, file: Path, suffix: str) -> str:
    """Write lmms-eval's task with its data replaced by a local file, and return its name.

    Args:
        suffix: what it adds to a question; the task itself is taken as it is if that is its own.
    """
    name = "mmstar_local" if suffix else "mmstar_bare"
    task: dict[str, Any] = {
        "include": str(Path(lmms_eval.__file__).parent / "tasks/mmstar/mmstar.yaml"),
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"val": str(file)}},
    }
    if not suffix:
        task["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": ""}}
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    return name


def ask_lmms_eval(
    folder: Path, task: str, prompt: str, gen_kwargs: str, device: str
) -> list[dict[str, Any]]:
    """Return what lmms-eval logs of each question, in the benchmark's order, and its figures."""
    output = Path(tempfile.mkdtemp(dir=folder, prefix="lmms-"))
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL_ID, "--device", device]
    command += ["--model_args", f"pretrained={folder / 'model'},prompt={prompt}"]
    command += ["--tasks", task, "--include_path", str(folder / "tasks")]
    command += ["--batch_size", str(BATCH_SIZE), "--output_path", str(output), "--log_samples"]
    command += ["--gen_kwargs", gen_kwargs] if gen_kwargs else []
    done = subprocess.run(command, capture_output=True, text=True)
    (log,) = output.glob("*/*_samples_*.jsonl") if done.returncode == 0 else (None,)
    if log is None:
        raise SystemExit(f"lmms-eval failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    (results,) = output.glob("*/*_results.json")
    average = json.loads(results.read_text())["results"][task]["average,none"]
    return [json.loads(line) | {"macro": average} for line in log.read_text().splitlines()]


def compare(
    name: str,
    ours: MMStarResult,
    theirs: Sequence[dict[str, Any]],
    part: Callable[[str], Figures],
    items: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Return of how many questions the answers are equal, and of how many the verdicts.

    Args:
        items: the questions that count; None takes all.
    """
    assert [row["average"]["question_id"] for row in theirs] == list(ours.indices)
    chosen = range(len(theirs)) if items is None else items
    outputs = [row["filtered_resps"] for row in theirs]
    correct = [bool(row["average"]["score"]) for row in theirs]
    texts = sum(ours.outputs[i].strip() == outputs[i] for i in chosen)
    verdicts = sum(ours.correct[i] == correct[i] for i in chosen)
    accuracies = [sum(right[i] for i in chosen) / len(chosen) for right in (ours.correct, correct)]
    print(
        f"{name}: of {len(chosen)} questions {texts} answers and {verdicts} verdicts equal; "
        f"accuracy {accuracies[0]:.4f} here and {accuracies[1]:.4f} there; average over axes, of "
        f"all, {ours.macro_accuracy:.6f} and {theirs[0]['macro']:.6f}; "
        f"{len(set(outputs))} different answers",
        flush=True,
    )
    part(name).add(
        questions=len(chosen),
        equal_answers=texts,
        equal_verdicts=verdicts,
        accuracies=accuracies,
        macro=[ours.macro_accuracy, theirs[0]["macro"]],
        different_answers=len(set(outputs)),
    )
    return texts, verdicts


if __name__ == "__main__":
    main()
