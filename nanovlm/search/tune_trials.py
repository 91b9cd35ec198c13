"""Trials of Ray Tune without what Tune does for each of its own, by means of its private parts.

Tune makes a folder for each trial, parses its settings as a command line, and asks the cluster's
head three times for the class that runs it. With 256 slots that was a third of what its thread did.
`tests/search/test_tune_trials.py` names what breaks when Ray changes these parts.
"""

from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.resources import resource_dict_to_pg_factory
from ray.tune.search import Searcher, SearchGenerator

_RESOURCES = resource_dict_to_pg_factory()
"""That each trial asks for, and nobody gives: worker groups have what trials need."""


class TrialMaker(SearchGenerator):
    """Makes Tune's trials of what a searcher suggests."""

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return Searcher, ()  # Tune pickles it into a state that nobody reads

    def create_trial_if_possible(self, experiment_spec: dict[str, Any]) -> Trial | None:
        trial_id = f"{self._counter:08}"
        config: Any = self.searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            self._finished = True
            return None
        if config is None:
            return None
        self._counter += 1
        return _Trial(
            experiment_spec["run"],
            config=config,
            trial_id=trial_id,
            storage=experiment_spec["storage"],
        )


class _Trial(Trial):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, stub=True, **options)  # the name is not looked up
        self.stub = False

    def get_trainable_cls(self) -> type[tune.Trainable]:
        return tune.Trainable  # `trials_in_threads` has what makes it

    def create_placement_group_factory(self) -> None:
        self.placement_group_factory = _RESOURCES

    def init_local_path(self) -> None:
        """Make no folder."""
        assert self.storage is not None, "the experiment has one"
        self.storage.trial_dir_name = self.trial_id
