"""Trials of Ray Tune that are made here: each test names what breaks when Ray changes."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ray import tune
from ray.tune import registry
from ray.tune.search import Searcher

from nanovlm.cluster.ray_cluster import Cluster
from nanovlm.search.tune_threads import trials_in_threads
from nanovlm.search.tune_trials import TrialMaker
from tests.search.trainables import ValueTrainable

NUM_TRIALS = 12


class Values(Searcher):
    """Suggests numbers; between two of them it has nothing to suggest."""

    def __init__(self) -> None:
        super().__init__("value", "max")
        self.suggested = list[str]()
        self.ended = dict[str, float]()
        self._has_one = True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        self._has_one = not self._has_one
        if len(self.suggested) == NUM_TRIALS:
            return Searcher.FINISHED  # type: ignore[return-value]
        if not self._has_one:
            return None
        self.suggested.append(trial_id)
        return {"value": len(self.suggested)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        assert result is not None and not error
        self.ended[trial_id] = result["value"]


class Trial(ValueTrainable):
    def step(self) -> dict[str, Any]:
        return {"value": self.value, "done": True}


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_trials_cost_no_folder_and_no_call_of_the_head(
    ray_cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    get = mock.Mock(wraps=registry._internal_kv_get)
    monkeypatch.setattr(registry, "_internal_kv_get", get)
    searcher = Values()
    tuner = tune.Tuner(
        Trial,
        tune_config=tune.TuneConfig(
            num_samples=-1, search_alg=TrialMaker(searcher), reuse_actors=True
        ),
        run_config=tune.RunConfig(name="trials", storage_path=str(tmp_path), verbose=0),
    )
    with trials_in_threads(Trial):
        tuner.fit()
    assert len(set(searcher.suggested)) == NUM_TRIALS
    assert searcher.ended == {name: n for n, name in enumerate(searcher.suggested, 1)}
    assert get.call_count < NUM_TRIALS, "for the class of the whole search at most"
    assert "metrics" not in caplog.text, "nobody looks for files that each would have"
    names = {path.name for path in tmp_path.rglob("*")}
    assert names and not names & set(searcher.suggested)
