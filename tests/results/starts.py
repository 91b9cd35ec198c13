"""What observers are told when a made-up run begins."""

from pathlib import Path
from typing import Any

from nanovlm.config.search_settings import Budget
from nanovlm.config.space import load_space
from nanovlm.watch.observer import RunStart

REPOSITORY = Path(__file__).parents[2]

DATA: dict[str, Any] = {
    "training": {"samples": 900, "rows": 300, "subsets": {}, "bad_rows": []},
    "benchmark": {"samples": 1224},
}


def search_start(folder: Path = Path("results/digits"), **changes: Any) -> RunStart:
    """Return the start of the digits search, or of one with another budget."""
    budget = changes.pop("budget", {"trials": 16})
    space = load_space(REPOSITORY / "search_spaces" / "digits.yaml")
    space = space.__class__(**{**vars(space), "budget": Budget(**budget)})
    known: dict[str, Any] = {
        "folder": folder,
        "config": space.base,
        "space": space,
        "objective": space.objective,
        "milestones": (100, 300),
        "trial_samples": 900,
        "data": DATA,
        "description": "digits: trials of 900 samples, compared at 100, 300",
        "dashboard_url": "http://127.0.0.1:8265",
        "concurrency": 2,
    }
    return RunStart(**known | changes)


def single_start(folder: Path = Path("results/single"), **changes: Any) -> RunStart:
    """Return the start of a single run."""
    return search_start(folder, **{"space": None, "concurrency": 1, **changes})
