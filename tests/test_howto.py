"""The data that docs/howto.md makes can be trained on."""

import re
from pathlib import Path

import pytest

from nanovlm.resources import Resources
from tests.tiny import digits_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "howto.md"


def test_the_example_makes_data_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "docs/howto.md", "exec"), {})
    config = digits_config(
        train_dataset_path="my_data",
        train_dataset_name=("colours",),
        test_dataset_path="my_benchmark",
        data_cutoff_idx=None,
    )
    resources = Resources("cpu")
    samples, _ = resources.training_data(config)
    assert len(resources.benchmark(config)) == 400
    data = resources.describe_data(config)
    assert data["training"]["subsets"]["colours"]["turns"] == 400
    assert data["training"]["bad_rows"] == []
    assert len(samples) + data["training"]["subsets"]["colours"]["over_long_turns"] >= 320
