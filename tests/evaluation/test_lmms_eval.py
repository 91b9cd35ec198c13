"""The adapter in lmms-eval itself, where that is installed; docs/howto.md says how.

What the adapter asks of a model is tested without it, in test_answering.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval import models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.digits import digits_benchmark_rows
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.evaluation.lmms_eval import MODEL_ID, LmmsEvalModel, manifest
from nanovlm.evaluation.mmstar import evaluate_mmstar, num_new_tokens
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.resources import Resources
from tests.devices import CPU
from tests.tiny import digits_config

ONE_IMAGE = digits_config()
TILED = build_config(preset_layer("digits-tiles"))
COMMON = {"output_type": "generate_until", "dataset_path": "parquet", "test_split": "val"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a saved model, the digits' benchmark and tasks about it."""
    path = tmp_path_factory.mktemp("lmms_eval")
    for config in (ONE_IMAGE, TILED):
        model_of(config).save_pretrained(path / config.vlm.generation)
    rows = digits_benchmark_rows()
    rows.to_parquet(path / "digits.parquet")
    data: dict[str, Any] = {"dataset_kwargs": {"data_files": {"val": str(path / "digits.parquet")}}}
    metrics = {"metric_list": [{"metric": "exact_match", "aggregation": "mean"}]}
    shared: dict[str, Any] = (
        COMMON | data | metrics | {"doc_to_text": "question", "doc_to_target": "answer"}
    )
    with_image = shared | {"doc_to_visual": "image"}
    choices = with_image | {
        "output_type": "multiple_choice",
        "doc_to_choice": list("ABCD"),
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    tasks = {"digits_asked": with_image, "digits_chosen": choices, "digits_unseen": shared}
    for name, task in tasks.items():
        (path / f"{name}.yaml").write_text(json.dumps({"task": name} | task))
    return path


def model_of(config: TrainConfig) -> VisionLanguageModel:
    return VisionLanguageModel(config.vlm, seed=1).eval()


def evaluate(
    folder: Path, task: str, config: TrainConfig = ONE_IMAGE, **changes: Any
) -> dict[str, Any]:
    pretrained = str(folder / config.vlm.generation)
    arguments = {"pretrained": pretrained, "prompt": "mmstar"} | changes
    num_tokens = num_new_tokens(model_tokenizer(config.vlm), "ABCD")
    results: dict[str, Any] = simple_evaluate(
        model=MODEL_ID,
        model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size="32",
        device="cpu",
        gen_kwargs=f"max_new_tokens={num_tokens},do_sample=False",
    )
    return results


def test_lmms_eval_registers_the_model() -> None:
    assert models.get_model(MODEL_ID) is LmmsEvalModel
    assert models.get_model_manifest(MODEL_ID) == manifest()
    assert models.get_model_manifest("nanovlm").chat_class_path.startswith("lmms_eval.")


@pytest.mark.parametrize("config", [ONE_IMAGE, TILED], ids=["one image", "tiles"])
def test_answers_are_those_of_the_projects_own_evaluation(
    folder: Path, config: TrainConfig
) -> None:
    benchmark, tokenizer = Resources(CPU).benchmark(config), model_tokenizer(config.vlm)
    expected = evaluate_mmstar(model_of(config), benchmark, tokenizer, 32, CPU).outputs
    samples = evaluate(folder, "digits_asked", config)["samples"]["digits_asked"]
    assert [sample["filtered_resps"][0] for sample in samples] == [s.strip() for s in expected]


@pytest.mark.parametrize("config", [ONE_IMAGE, TILED], ids=["one image", "tiles"])
def test_choices_are_weighed(folder: Path, config: TrainConfig) -> None:
    """The choice with the lowest loss is the likeliest of the letters."""
    benchmark, tokenizer = Resources(CPU).benchmark(config), model_tokenizer(config.vlm)
    expected = evaluate_mmstar(model_of(config), benchmark, tokenizer, 32, CPU).letter_accuracy
    results = evaluate(folder, "digits_chosen", config)["results"]["digits_chosen"]
    assert results["acc,none"] == pytest.approx(expected)


def test_questions_without_an_image_are_refused_or_see_black(folder: Path) -> None:
    with pytest.raises(SystemExit, match=f"{MODEL_ID}: task digits_unseen.*has 0 images"):
        evaluate(folder, "digits_unseen")
    assert len(evaluate(folder, "digits_unseen", images="first")["samples"]["digits_unseen"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model_args: must name a model"),
        ("pretraned=x", "unknown 'pretraned'. Did you mean 'pretrained'"),
        ("pretrained=/nowhere/best", "there is no folder|no such folder"),
        ("pretrained=x,dtype=half", "dtype must be one of auto, float32, bfloat16, got 'half'"),
        ("pretrained=x,images=two", "images must be one of one, first, all, got 'two'"),
        ("pretrained=x,prompt=p,max_new_tokens=0", "(?s)prompt must be one.*max_new_tokens"),
        ("pretrained=x,device=tpu9", "--device: 'tpu9' cannot be used"),
        ("pretrained=x,batch_size=none", "--batch_size: must be auto or a whole number"),
    ],
)
def test_bad_arguments_end_with_one_message(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        LmmsEvalModel.create_from_arg_string(arguments)
