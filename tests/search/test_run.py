"""A whole search from Python, and what an observer of it is told."""

import gc
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from nanovlm.config.sources import config_values
from nanovlm.config.space import load_space
from nanovlm.errors import UserError
from nanovlm.messages import ProgressUpdate, TrialRecord
from nanovlm.results.read import read_records
from nanovlm.results.write import ResultsStore
from nanovlm.search import run
from nanovlm.search.plan import SearchPlan
from nanovlm.search.run import run_plan, run_search
from nanovlm.watch.observer import Observer, RunStart
from tests.records import make_record, make_report, make_speed

REPOSITORY = Path(__file__).parents[2]

SPACE = """
preset: digits
base: {data_cutoff_idx: 200, epochs: 1}
search: {lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}}
scheduler: {name: none}
budget: {trials: 2}
confirm: {top: 1, seeds: 1}
"""


class Witness(Observer):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.starts: list[RunStart] = []
        self.records: list[TrialRecord] = []
        self.updates: list[ProgressUpdate] = []
        self.ends: list[Mapping[str, Any]] = []
        self.num_uncollected = 0
        """Objects that the garbage collector passes over."""

    def begin(self, start: RunStart) -> None:
        self.starts.append(start)
        self.num_uncollected = gc.get_freeze_count()

    def progress(self, update: ProgressUpdate) -> None:
        self.updates.append(update)

    def trial_changed(self, record: TrialRecord) -> None:
        self.records.append(record)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.ends.append(summary)


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("ray_cluster")
def test_the_example_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "digits.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    witness = Witness()
    monkeypatch.setattr(run, "standard_observers", lambda: [witness])
    scope: dict[str, Any] = {}
    exec(compile(example(), "docs/python.md", "exec"), scope)
    *ended_trials, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[:2] for line in ended_trials) == [
        ["confirm-0-seed-1", "completed"],
        ["confirm-1-seed-1", "completed"],
        ["trial-0000", "completed"],
        ["trial-0001", "completed"],
    ]
    assert last.startswith("results/digits {'lr_mp': ")
    outcome = scope["outcome"]
    assert not (outcome.is_interrupted or outcome.has_failed)
    assert outcome.summary["ended_by"] == "budget.trials: 2 trials are done"
    check_what_was_told(witness, outcome.folder, outcome.summary)
    assert witness.num_uncollected > 100_000, "else a collection stops all threads for long"
    assert gc.get_freeze_count() == 0, "what the caller has is the caller's"
    free = ray.available_resources()["CPU"]
    assert free == ray.cluster_resources()["CPU"], "given back when it returns, for who comes next"


def example() -> str:
    document = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    section = document[: document.index("## Reading results")]
    (text,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(text)


def check_what_was_told(witness: Witness, folder: Path, summary: Mapping[str, Any]) -> None:
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    (start,) = witness.starts  # once, though there are two stages
    assert (start.folder, start.trial_samples) == (folder, 1372)
    assert start.dashboard_url is not None
    assert witness.ends == [summary]
    ended = [r for r in witness.records if r.end is not None]
    assert [r for r in ended if not r.confirms] == read_records(folder)
    assert next(r.state for r in witness.records if r.number == 0) == "running"
    asked = {update.trial_id for update in witness.updates if update.stage == "evaluating"}
    assert asked <= {r.trial_id for r in ended}
    assert all(p.total_samples >= p.samples_seen > 0 for p in witness.updates)


def test_a_folder_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(tmp_path / "space.yaml")
    with pytest.raises(UserError, match="holds no search to go on with"):
        run_search(space, tmp_path / "nowhere", resume=True)
    (tmp_path / "other").mkdir()
    other = load_space(tmp_path / "space.yaml", {"epochs": 2})
    (tmp_path / "other" / "space.yaml").write_text(other.to_yaml())
    with pytest.raises(UserError, match="is of another space; it differs in base"):
        run_search(space, tmp_path / "other", resume=True)


def test_a_search_that_is_over_chooses_again_by_another_bound(tmp_path: Path) -> None:
    """Nothing runs for it, so Ray is not started."""
    file, folder = tmp_path / "space.yaml", tmp_path / "over"
    file.write_text(SPACE)
    seconds = {"metric": "seconds_per_sample"}
    spaces = [
        load_space(
            file,
            {"objective": [{"metric": "mmstar_accuracy"}, seconds | bound], "confirm.top": 0},
        )
        for bound in ({}, {"at_most": 0.01})
    ]
    store = ResultsStore(folder, spaces[0].objective, 0.0)
    with store.opened(resume=False):
        store.begin()
        store.write_text("space.yaml", spaces[0].to_yaml())
        for number, (accuracy, rate) in enumerate([(0.9, 25.0), (0.3, 125.0)]):
            speed = make_speed(samples_per_second=rate)
            report = make_report(900, {"mmstar_accuracy": accuracy}, speed=speed, is_final=True)
            values = {"lr_mp": 0.002 * (number + 1)}
            store.take(
                make_record(
                    number,
                    reports=[report],
                    parameters=values,
                    config=config_values(spaces[0].config_for(values)),
                )
            )
        store.close(1.0, "over")
        assert store.best is not None and store.best.number == 0
    plan = SearchPlan(spaces[1], (), 900, {"benchmark": {"samples": 10}})
    outcome = run_plan(plan, folder, resume=True)
    assert outcome.notes[-1].startswith(
        "chosen: trial 1 has the best mmstar_accuracy of the trials with seconds_per_sample at "
        "most 0.01 (mmstar_accuracy 0.3, seconds_per_sample 0.008)"
    )
    assert "# trial 1: " in (folder / "best.yaml").read_text()
    assert load_space(folder / "space.yaml").objective == spaces[1].objective
    assert json.loads((folder / "summary.json").read_text())["pareto"]["chosen"] == 1
