"""What a search takes over from the trials of another one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nanovlm.cluster.relay import NUMBER, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.sources import config_values
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.records import record_line
from nanovlm.samplers.history import OTHERS
from nanovlm.search.searcher import StudySearch
from nanovlm.search.warm_start import learn_from, read_earlier_trials
from tests.records import make_record, make_report, make_speed

SPACE = """
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  batch_size: {choice: [64, 256]}
"""


def space(folder: Path, text: str = SPACE, **overrides: Any) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(f"warm_start: [{folder / 'older'}]\n{text}")
    return load_space(path, overrides)


def older(folder: Path, *changes: dict[str, Any]) -> None:
    """Make a results folder with a trial for each of the changes of the default one."""
    (folder / "older").mkdir(exist_ok=True)
    base = space(folder).base
    lines = []
    for number, change in enumerate(changes):
        speed = change.pop("speed", None)
        values = {"lr_mp": 0.001 * (number + 1), "batch_size": 64, **change.pop("values", {})}
        reports = [
            make_report(seen, {"mmstar_accuracy": value}, speed=speed)
            for seen, value in change.pop("reports", [(104, 0.2), (1000, 0.5)])
        ]
        record = make_record(
            number,
            change.pop("state", "completed"),
            parameters=values,
            config=config_values(dataclasses.replace(base, **values)),
            reports=reports,
            **change,
        )
        lines.append(record_line(record))
    (folder / "older" / "trials.jsonl").write_text("".join(lines))


def test_finished_and_stopped_trials_are_learnt_from(tmp_path: Path) -> None:
    older(
        tmp_path,
        {},
        {"state": "stopped", "reports": [(104, 0.3)]},
        {"state": "failed"},
        {"values": {"lr_mp": 0.5}},
        {"values": {"batch_size": 128}},
    )
    searched = space(tmp_path)
    (earlier,) = read_earlier_trials(searched)
    assert str(earlier) == (
        f"warm start: {tmp_path / 'older'}: 2 of 5 trials taken (1 failed, 1 with lr_mp outside "
        "log_uniform [0.0001, 0.1], 1 with batch_size outside choice [64, 256])"
    )
    searcher = StudySearch(searched, tmp_path, 1, StopSwitch(), (100,))
    for _ in range(2):  # when the search goes on, they are there already
        learn_from(searcher.recorder, (earlier,), trial_samples=1000)
    full, stopped = searcher.study.trials
    assert (full.state.name, full.value) == ("COMPLETE", 0.5)
    assert (stopped.state.name, stopped.value) == ("PRUNED", 0.3)
    assert full.params == {"lr_mp": 0.001, "batch_size": 0}
    assert full.intermediate_values == {100: 0.2, 1000: 0.5}
    suggestion = searcher.suggest("tune-0")
    assert suggestion == {NUMBER: 0, VALUES: searched.default_values()}


def test_a_full_trial_of_a_shorter_search_is_no_full_one_here(tmp_path: Path) -> None:
    older(tmp_path, {})
    searcher = StudySearch(space(tmp_path), tmp_path, 1, StopSwitch())
    learn_from(searcher.recorder, read_earlier_trials(space(tmp_path)), trial_samples=3000)
    (trial,) = searcher.study.trials
    assert (trial.state.name, trial.value) == ("PRUNED", 0.5)


def test_a_key_that_was_not_searched_there_has_its_value(tmp_path: Path) -> None:
    older(tmp_path, {})
    text = f"{SPACE}  weight_decay: default\nbase: {{epochs: 2}}"
    (earlier,) = read_earlier_trials(space(tmp_path, text))
    assert earlier.records[0].parameters["weight_decay"] == 0.01
    assert earlier.differences == ("epochs=5",)
    assert str(earlier).endswith("1 of 1 trials taken; there epochs=5")


def test_trials_of_before_there_were_other_rules_are_told_apart(tmp_path: Path) -> None:
    older(tmp_path, {})
    file = tmp_path / "older" / "trials.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["config"]["mmstar_rules"]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (earlier,) = read_earlier_trials(space(tmp_path))
    assert earlier.differences == ("mmstar_rules='lmms-eval-0.7.1'",)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no results folder of a search"):
        read_earlier_trials(space(tmp_path))
    older(tmp_path, {"state": "failed"}, {"values": {"lr_mp": 0.5}})
    with pytest.raises(UserError) as refused:
        read_earlier_trials(space(tmp_path))
    assert "has no trial that fits this space: 1 failed, 1 with lr_mp outside" in str(refused.value)
    with pytest.raises(UserError, match=r"2 without val_loss|1 failed, 1 without val_loss"):
        read_earlier_trials(
            space(tmp_path, **{"objective.metric": "val_loss", "objective.mode": "min"})
        )


def test_trials_without_one_of_the_objectives_are_not_taken(tmp_path: Path) -> None:
    older(tmp_path, {}, {"speed": make_speed(samples_per_second=50.0)})
    both = [{"metric": "mmstar_accuracy"}, {"metric": "seconds_per_sample"}]
    searched = space(tmp_path, objective=both)
    earlier = read_earlier_trials(searched)
    assert "1 of 2 trials taken (1 without seconds_per_sample)" in str(earlier[0])
    searcher = StudySearch(searched, tmp_path, 1, StopSwitch(), (100,))
    learn_from(searcher.recorder, earlier, 1000)
    (taken,) = searcher.study.trials
    assert taken.value == 0.5 and taken.user_attrs[OTHERS] == {"100": [0.02], "1000": [0.02]}


def test_a_search_of_one_rate_for_both_backbones_tells_of_each(tmp_path: Path) -> None:
    older(tmp_path, {"values": {"lr_backbones": 3e-5}}, {"values": {"lr_vision_backbone": 2e-5}})
    path = tmp_path / "older" / "trials.jsonl"
    first, second = path.read_text().splitlines()
    record = json.loads(first)  # as it was before there was a rate for each
    for key in ("lr_vision_backbone", "lr_language_backbone"):
        del record["config"][key]
    path.write_text(f"{json.dumps(record)}\n{second}\n")
    text = f"{SPACE}  lr_vision_backbone: default\n  lr_language_backbone: default"
    (earlier,) = read_earlier_trials(space(tmp_path, text))
    rates = [
        (values["lr_vision_backbone"], values["lr_language_backbone"])
        for values in (record.parameters for record in earlier.records)
    ]
    assert rates == [(3e-5, 3e-5), (2e-5, 1e-4)]
