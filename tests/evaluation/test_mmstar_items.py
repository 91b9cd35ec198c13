"""A benchmark of MMStar's size and columns: no item's score depends on how it was asked.

Two workers (gloo) start once; what one worker gives is computed beside them.
"""

import dataclasses
import io
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from nanovlm.data.digits import BENCHMARK_FEATURES, digits_tokenizer
from nanovlm.data.prepared import prepare_benchmark
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.evaluation.mmstar_result import MMStarResult
from nanovlm.models.vision_language_model import VisionLanguageModel
from tests.hub_data import AXES
from tests.tiny import digits_config, vlm_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # two processes import all anew

NUM_ITEMS = 1500
TOKENIZER = digits_tokenizer()
CONFIG = digits_config(
    vlm_config(
        vit_hidden_dim=32,
        lm_hidden_dim=32,
        lm_inter_dim=64,
        lm_vocab_size=64,
        lm_n_blocks=2,
        lm_tie_weights=False,
    )
)


def mmstar_rows() -> list[dict[str, Any]]:
    """Return questions of 5 to 45 words, with an image of noise each."""
    rng = np.random.default_rng(0)
    words = sorted(word for word in TOKENIZER.get_vocab() if word.isalnum())
    rows = []
    for index in range(NUM_ITEMS):
        category = [*AXES][index % len(AXES)]
        axis = AXES[category][index // len(AXES) % 3]
        options = ", ".join(f"{letter}: {rng.choice(words)}" for letter in "ABCD")
        question = " ".join(rng.choice(words, rng.integers(1, 42)))
        pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png")
        rows.append(
            {
                "index": index,
                "question": f"{question}\nOptions: {options}",
                "image": {"bytes": file.getvalue(), "path": f"images/{index}.jpg"},
                "answer": "ABCD"[rng.integers(4)],
                "category": category,
                "l2_category": axis,
                "meta_info": {"source": "test", "split": "val", "image_path": f"{index}.jpg"},
            }
        )
    return rows


def write_benchmark(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    data = datasets.Dataset.from_list(rows, features=BENCHMARK_FEATURES)
    data.to_parquet(str(folder / "mmstar.parquet"))


def outspoken_model() -> VisionLanguageModel:
    """Return a model with random weights that names letters, ends answers and says other things."""
    model = VisionLanguageModel(CONFIG.vlm, seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "MP" in name or "mlp" in name:
                parameter.mul_(3)  # image and words both count
        favoured = [0, *(TOKENIZER.encode(letter).ids[0] for letter in "ABCD")]
        model.decoder.head.weight[favoured] *= 2
    return model


def score(folder: Path, benchmark: str, batch_size: int) -> MMStarResult:
    model = VisionLanguageModel.from_pretrained(folder / "model")
    config = dataclasses.replace(CONFIG, test_dataset_path=str(folder / benchmark))
    questions = prepare_benchmark(config, TOKENIZER)
    return evaluate_mmstar(model, questions, TOKENIZER, batch_size, torch.device("cpu"))


def worker(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    result = score(folder, "shuffled", 7)
    (folder / f"rank_{number}").write_bytes(pickle.dumps(result))
    dist.barrier()
    os._exit(0)  # an ordinary end now and then aborts in gloo's threads, with all work done


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MMStarResult]:
    """The result of every way to ask, the first of them one question at a time."""
    folder = tmp_path_factory.mktemp("mmstar")
    outspoken_model().save_pretrained(folder / "model")
    rows = mmstar_rows()
    write_benchmark(folder / "in_order", rows)
    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    write_benchmark(folder / "shuffled", [rows[i] for i in order])
    processes = mp.spawn(worker, (folder,), nprocs=2, join=False)
    found = {
        f"{benchmark}, {batch_size} at a time": score(folder, benchmark, batch_size)
        for benchmark, batch_size in (("in_order", 1), ("in_order", 7), ("shuffled", 32))
    }
    assert processes is not None
    while not processes.join():
        pass
    for number in range(2):
        name = f"two workers, shuffled, 7 at a time, as rank {number} has it"
        found[name] = pickle.loads((folder / f"rank_{number}").read_bytes())
    return found


def items(result: MMStarResult) -> dict[int, tuple[Any, ...]]:
    columns = (result.answers, result.outputs, result.correct, result.letters,
               result.categories, result.l2_categories)  # fmt: skip
    return dict(zip(result.indices, zip(*columns, strict=True), strict=True))


def test_the_score_of_an_item_is_its_own(results: dict[str, MMStarResult]) -> None:
    alone = next(iter(results.values()))
    expected = items(alone)
    assert [*expected] == [*range(NUM_ITEMS)]
    nlls = dict(zip(alone.indices, alone.letter_nlls, strict=True))
    for name, result in results.items():
        differing = {i for i, item in items(result).items() if item != expected[i]}
        assert differing == set(), name
        assert len(result.indices) == NUM_ITEMS
        found = torch.tensor(result.letter_nlls)
        # The large weights amplify rounding, to 1e-5 or 3e-5 by the kind of CPU.
        torch.testing.assert_close(
            found, torch.tensor([nlls[i] for i in result.indices]), atol=1e-4, rtol=0
        )


def test_the_answers_vary(results: dict[str, MMStarResult]) -> None:
    """Otherwise the test above would say little."""
    result = next(iter(results.values()))
    assert len(set(result.outputs)) > 200
    assert "" in result.outputs
    assert 100 < sum(result.correct) < 1400
    assert min(map(result.letters.count, "ABCD")) > 100
    assert len(set(result.letter_nlls)) > 1400


def test_the_parts_are_those_of_mmstar(results: dict[str, MMStarResult]) -> None:
    result = next(iter(results.values()))
    assert list(result.category_accuracy) == sorted(AXES)
    assert len(result.axis_accuracy) == 18
    assert result.accuracy == pytest.approx(sum(result.category_accuracy.values()) / 6)
