"""The hyperparameters of LCBench as a search space of this project."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovlm.config.parameter import Kind, Parameter
from nanovlm.config.schema import TrainConfig
from nanovlm.config.search_settings import SETTINGS, SpaceFile
from nanovlm.config.space import SearchSpace

METRIC = "accuracy"
NUM_QUESTIONS = 1500
"""Of a noisy accuracy: those of MMStar."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpace(SearchSpace):
    """A space whose keys are the benchmark's, and no TrainConfig's; its base says nothing."""

    defaults: Mapping[str, Any]

    def default_values(self) -> dict[str, Any]:
        """Return the values of trial 0."""
        return dict(self.defaults)


def benchmark_space(entries: Mapping[str, Mapping[str, Any]]) -> BenchmarkSpace:
    """Return the space of the benchmark's entries, with this project's default settings.

    Args:
        entries: by key: `type`, `lower`, `upper`, `log` and `default` as `config_space.json` has
            them. The defaults are in the middle of the ranges.
    """
    settings = SpaceFile.model_validate({"search": {"-": 0}, "objective": {"metric": METRIC}})
    return BenchmarkSpace(
        name="lcbench",
        base=TrainConfig(),
        parameters=tuple(_parameter(key, entry) for key, entry in entries.items()),
        defaults={key: entry["default"] for key, entry in entries.items()},
        **{section: getattr(settings, section) for section in SETTINGS},
    )


def _parameter(key: str, entry: Mapping[str, Any]) -> Parameter:
    kinds: dict[tuple[str, bool], Kind] = {
        ("uniform_float", False): "uniform",
        ("uniform_float", True): "log_uniform",
        ("uniform_int", False): "int",
        ("uniform_int", True): "log_int",
    }
    kind = kinds[entry["type"], entry["log"]]
    return Parameter(key=key, kind=kind, values=(entry["lower"], entry["upper"]), when={})
