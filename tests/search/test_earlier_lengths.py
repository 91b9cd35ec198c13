"""How earlier searches of another length are told apart, ordered and learnt from."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.messages import TrialState
from nanovlm.records import record_line
from nanovlm.samplers.history import CURVE, SOURCE
from nanovlm.search.searcher import StudySearch
from nanovlm.search.warm_start import (
    EarlierTrials,
    compare_lengths,
    learn_from,
    read_earlier_trials,
)
from tests.records import make_record, make_report

SPACE = """
base: {epochs: 5}
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  batch_size: {choice: [64, 256]}
"""
DATA = {"training": {"samples": 1000}}
FULL = 5000
"""Samples of a full training here, of 5 epochs."""


def space(folder: Path, text: str = SPACE, **overrides: Any) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(f"warm_start: [{folder / 'older'}]\n{text}")
    return load_space(path, overrides)


Trials = Sequence[tuple[TrialState, dict[str, Any], Sequence[tuple[int, float]]]]
"""State, what is otherwise in the configuration, and the reports."""

SHORTER: Trials = [
    ("completed", {"lr_mp": 0.01}, [(128, 0.3), (1000, 0.6)]),
    ("completed", {"lr_mp": 0.02}, [(256, 0.3), (1000, 0.5)]),
    ("stopped", {"lr_mp": 0.0002}, [(128, 0.2)]),
]


def older(folder: Path, trials: Trials = SHORTER, **base: Any) -> None:
    """Make a results folder of a search of one epoch."""
    (folder / "older").mkdir()
    config = dataclasses.replace(space(folder).base, **{"epochs": 1, **base})
    records = [
        make_record(
            number,
            state,
            config=config_values(dataclasses.replace(config, **values)),
            reports=[make_report(seen, {"mmstar_accuracy": value}) for seen, value in reports],
        )
        for number, (state, values, reports) in enumerate(trials)
    ]
    text = "".join(record_line(record) for record in records)
    (folder / "older" / "trials.jsonl").write_text(text)
    verdicts = [
        {"number": record.number, "milestone": 111, "samples_seen": report.samples_seen,
         "value": 0.1, "goes_on": True, "reason": "first"}
        for record in records
        for report in record.reports[:1]
    ]  # fmt: skip
    text = "".join(f"{json.dumps(verdict)}\n" for verdict in verdicts)
    (folder / "older" / "rungs.jsonl").write_text(text)


def compared(folder: Path) -> EarlierTrials:
    here = space(folder)
    (earlier,) = compare_lengths(here, read_earlier_trials(here), FULL, DATA)
    return earlier


def searcher_of(folder: Path) -> StudySearch:
    searcher = StudySearch(space(folder), folder, 1, StopSwitch(), (555, 1666))
    learn_from(searcher.recorder, (compared(folder),), FULL)
    return searcher


def test_a_shorter_search_is_a_source_of_its_own(tmp_path: Path) -> None:
    older(tmp_path)
    earlier = compared(tmp_path)
    assert str(earlier) == (
        f"warm start: {tmp_path / 'older'}: 3 of 3 trials taken; there epochs=1; its full "
        "trainings have 1000 samples, 0.2 times those here (2 trials in full, 1 shorter): the "
        "sampler finds out how much they tell"
    )
    trials = searcher_of(tmp_path).study.trials
    source = str((tmp_path / "older").resolve())
    assert {trial.user_attrs[SOURCE] for trial in trials} == {source}
    curves = [trial.user_attrs[CURVE] for trial in trials]
    assert curves[:2] == [[[0.111, 0.3], [1.0, 0.6]], [[0.111, 0.3], [1.0, 0.5]]]
    assert curves[2] == [[0.111, 0.2]], "by milestone, whatever the batch size was"
    assert {trial.state.name for trial in trials} == {"PRUNED"}


@pytest.mark.parametrize("samples", [5000, 4960, 5049])
def test_a_search_of_the_same_length_is_learnt_from_as_before(tmp_path: Path, samples: int) -> None:
    older(tmp_path, [("completed", {}, [(600, 0.3), (samples, 0.6)])], turns="first")
    assert compared(tmp_path).lengths is None
    (trial,) = searcher_of(tmp_path).study.trials
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.6)
    assert SOURCE not in trial.user_attrs and trial.intermediate_values == {555: 0.3, samples: 0.6}


def test_without_a_full_trial_the_length_follows_from_the_data(tmp_path: Path) -> None:
    older(tmp_path, SHORTER[2:])
    with pytest.raises(UserError, match=r"how long its trainings are is unknown.*data\.json"):
        compared(tmp_path)
    data = {"training": {"samples": 500}, "benchmark": {}}
    (tmp_path / "older" / "data.json").write_text(json.dumps(data))
    lengths = compared(tmp_path).lengths
    assert lengths is not None and lengths.there == 500
    assert lengths.shares == {"trial-0000": (111 / 500,)}


@pytest.mark.parametrize(("max_steps", "there"), [(1, 64), (3, 192), (100, 1000)])
def test_without_a_full_trial_max_steps_shortens_the_length(
    tmp_path: Path, max_steps: int, there: int
) -> None:
    older(tmp_path, SHORTER[2:], max_steps=max_steps, batch_size=64)
    (tmp_path / "older" / "data.json").write_text(json.dumps({**DATA, "benchmark": {}}))
    lengths = compared(tmp_path).lengths
    assert lengths is not None and lengths.there == there


@pytest.mark.parametrize(
    "base, message",
    [
        ({"turns": "first"}, r"otherwise than in the number of rows: there turns='first', here 'a"),
        (
            {"train_dataset_name": ("ai2d",)},
            r"there train_dataset_name=\['ai2d'\], here \['ai2d",
        ),
        ({"train_dataset_path": "me/other"}, r"train_dataset_path='me/other', here 'HuggingFaceM4"),
        ({"test_dataset_path": "me/other"}, r"there test_dataset_path='me/other', here 'Lin-Chen"),
        ({"formatting_min_rating": 2}, "there formatting_min_rating=2, here 1"),
    ],
)
def test_lengths_of_other_data_cannot_be_ordered(
    tmp_path: Path, base: dict[str, Any], message: str
) -> None:
    older(tmp_path, **base)
    with pytest.raises(UserError, match=message) as refused:
        compared(tmp_path)
    assert "its full trainings of 1000 samples cannot be ordered with those of 5000" in str(
        refused.value
    )


def test_a_search_that_is_older_than_a_key_had_its_default(tmp_path: Path) -> None:
    older(tmp_path, turns="first")
    file = tmp_path / "older" / "trials.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["config"]["turns"], line["config"]["formatting_min_rating"]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert compared(tmp_path).lengths is not None
    here = space(tmp_path, SPACE.replace("epochs: 5", "epochs: 5, formatting_min_rating: 2"))
    with pytest.raises(UserError, match="there formatting_min_rating=1, here 2"):
        compare_lengths(here, read_earlier_trials(here), FULL, DATA)


def test_a_version_of_the_same_data_is_the_same_data(tmp_path: Path) -> None:
    older(tmp_path, train_dataset_path="HuggingFaceM4/the_cauldron@abc", data_cutoff_idx=9)
    assert compared(tmp_path).lengths is not None
