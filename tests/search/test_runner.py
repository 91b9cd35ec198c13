"""A whole search from Python, and what an observer of it is told."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovlm.errors import UserError
from nanovlm.messages import Pulse, TrialRecord
from nanovlm.observer import Observer, RunStart
from nanovlm.results.store import read_records
from nanovlm.search.runner import run_search
from nanovlm.search.space import load_space

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
        self.pulses: list[Pulse] = []
        self.ends: list[Mapping[str, Any]] = []

    def begin(self, start: RunStart) -> None:
        self.starts.append(start)

    def pulse(self, pulse: Pulse) -> None:
        self.pulses.append(pulse)

    def trial_changed(self, record: TrialRecord) -> None:
        self.records.append(record)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.ends.append(summary)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_search_from_python(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    witness = Witness()
    folder = tmp_path / "mine"
    outcome = run_search(tmp_path / "space.yaml", folder, concurrency=1, observers=[witness])
    assert outcome.folder == folder
    assert not (outcome.is_interrupted or outcome.has_failed)
    assert outcome.summary["ended_by"] == "budget.trials: 2 trials are done"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(
        json.dumps(outcome.summary)
    )
    (start,) = witness.starts  # once, though there are two stages
    assert (start.folder, start.num_slots) == (folder, 1)
    assert start.dashboard_url is not None
    assert witness.ends == [outcome.summary]
    ended = [replace(r, checkpoint=None) for r in witness.records if r.state != "running"]
    assert [r for r in ended if not r.confirms] == read_records(folder)
    assert [r.trial_id for r in ended if r.confirms] == ["confirm-1-seed-1", "confirm-0-seed-1"]
    asked = {pulse.trial_id for pulse in witness.pulses if pulse.stage == "evaluating"}
    assert asked <= {r.trial_id for r in ended}
    assert all(p.total_samples >= p.samples_seen > 0 for p in witness.pulses)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_example_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search_spaces").mkdir()
    space = SPACE.replace("trials: 2", "trials: 1").replace("top: 1", "top: 0")
    (tmp_path / "search_spaces" / "digits.yaml").write_text(space)
    monkeypatch.chdir(tmp_path)
    document = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    section = document[: document.index("## Reading results")]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(example, "docs/python.md", "exec"), {})
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"trial-0000 completed 0\.\d+", first)
    assert last == "results/digits {'lr_mp': 0.002}"


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
