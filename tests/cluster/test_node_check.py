"""A machine with other code or data than that of the search serves no trial."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from nanovlm.cluster import node_check
from nanovlm.cluster.node_check import NodeCheck
from nanovlm.cluster.worker import WorkerSettings, serve_broker
from nanovlm.errors import UserError
from nanovlm.resources import Resources
from tests.tiny import digits_config

CONFIG = digits_config(batch_size=16, data_cutoff_idx=20)


@pytest.fixture(scope="module")
def check() -> NodeCheck:
    resources = Resources("cpu")
    resources.training_data(CONFIG)
    resources.benchmark(CONFIG)
    return NodeCheck.of(CONFIG, resources.describe_data(CONFIG))


@pytest.fixture(autouse=True)
def known_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")


def refusal(check: NodeCheck) -> str:
    with pytest.raises(UserError) as refused:
        check.verify(Resources("cpu"))
    (message,) = refused.value.messages
    assert "\n" not in message, "the terminal has one line for it"
    return message


def test_the_same_machine_passes_and_keeps_what_was_prepared(
    check: NodeCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = Resources("cpu")
    check.verify(resources)
    monkeypatch.setattr("nanovlm.resources.prepare_training", lambda *_: pytest.fail("again"))
    monkeypatch.setattr("nanovlm.resources.prepare_benchmark", lambda *_: pytest.fail("again"))
    assert len(resources.training_data(CONFIG)[0]) and len(resources.benchmark(CONFIG))


@pytest.mark.parametrize(
    ("part", "setting"),
    [("training", "train_dataset_path"), ("benchmark", "test_dataset_path")],
)
def test_other_data(check: NodeCheck, part: str, setting: str) -> None:
    other = dataclasses.replace(check, keys={**check.keys, part: "of-another"})
    message = refusal(other)
    assert message.startswith(f"node 10.0.0.7: {setting}='builtin:digits' is other data there than")
    assert f"({check.keys[part]}, not of-another); copy the files with their times" in message


def test_no_data(check: NodeCheck, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, train_dataset_path=str(tmp_path / "gone"))
    message = refusal(dataclasses.replace(check, config=config))
    assert message.startswith("node 10.0.0.7: train_dataset_path")
    assert "gone" in message and message.endswith("the machine of the search has this data")


def test_other_code(check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(node_check, "_PACKAGE", tmp_path)
    node_check.code_hash.cache_clear()
    try:
        message = refusal(check)
    finally:
        node_check.code_hash.cache_clear()
    assert message.startswith(f"node 10.0.0.7: the code of the package in {tmp_path} is not that")


def test_a_worker_that_does_not_pass_asks_for_no_job(check: NodeCheck, tmp_path: Path) -> None:
    def gone() -> Any:
        raise RayActorError

    broker = SimpleNamespace(
        wait_until_closed=SimpleNamespace(remote=gone),
        next_job=SimpleNamespace(remote=lambda group: pytest.fail("it has asked")),
    )
    other = dataclasses.replace(check, code="another")
    settings = WorkerSettings("group-0", broker, str(tmp_path), check=other)
    with pytest.raises(UserError, match="is not that with which the run has started"):
        serve_broker(settings, torch.device("cpu"))
