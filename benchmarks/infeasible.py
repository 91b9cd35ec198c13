"""How often a search tries again what runs out of memory: the same problem, told in three ways.

    python benchmarks/infeasible.py               # 20 seeds, about a minute

Learning rate and batch size; larger batches are a little better, but the upper half of the sizes
does not fit into the memory. Ten random trials and the default come first, then 30 are counted.
`stock` is Ray Tune's OptunaSearch, which tells Optuna FAIL; the others are this project's searcher,
told FAIL and told infeasible.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.command_line import parser_of
from nanovlm.cluster.relay import FAILURE, INFEASIBLE, IS_FINAL, SAMPLES_SEEN, VALUES
from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import load_space
from nanovlm.search.searcher import StudySearch

METRIC = "mmstar_accuracy"
SIZES = [16, 32, 64, 128, 256, 512]
FITTING = 64
NUM_FIRST, NUM_COUNTED = 11, 30
SPACE = f"""
base: {{batch_size: 32}}
search: {{lr_mp: {{log_uniform: [1.0e-4, 1.0e-1]}}, batch_size: {{choice: {SIZES}}}}}
"""

Suggest = Callable[[str], dict[str, Any]]
Tell = Callable[[str, float | None], None]
"""With the value, None where the memory was not enough."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    methods: dict[str, Callable[[int], int]] = {
        "stock": stock,
        "ours, told FAIL": lambda seed: ours(seed, is_infeasible=False),
        "ours, told infeasible": lambda seed: ours(seed, is_infeasible=True),
    }
    print(f"out of memory in {NUM_COUNTED} trials after the first {NUM_FIRST}, {len(seeds)} seeds")
    for name, method in methods.items():
        counts = sorted(method(seed) for seed in seeds)
        print(f"{name:<22} mean {statistics.mean(counts):5.1f}   {counts}", flush=True)


def ours(seed: int, is_infeasible: bool) -> int:
    """Return how many of the counted trials fail with this project's searcher."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "space.yaml"
        path.write_text(SPACE)
        space = load_space(path, {"sampler.seed": seed})
        searcher = StudySearch(space, Path(temporary), 1, StopSwitch())

        def suggest(trial_id: str) -> dict[str, Any]:
            suggestion = searcher.suggest(trial_id)
            assert suggestion is not None, "the study file can be written"
            return dict(suggestion[VALUES])

        def tell(trial_id: str, value: float | None) -> None:
            result: dict[str, Any] = {METRIC: value, SAMPLES_SEEN: 1, IS_FINAL: True}
            if value is None:
                failure = {FAILURE: "out of memory", INFEASIBLE: is_infeasible}
                result = {METRIC: math.nan, SAMPLES_SEEN: 0, **failure}
            searcher.on_trial_complete(trial_id, result)

        return count(suggest, tell)


def stock(seed: int) -> int:
    """Return how many of the counted trials fail with OptunaSearch as it is."""
    searcher = OptunaSearch(metric=METRIC, mode="max", seed=seed)
    domains = {"lr_mp": tune.loguniform(1e-4, 1e-1), "batch_size": tune.choice(SIZES)}
    searcher.set_search_properties(METRIC, "max", domains)

    def suggest(trial_id: str) -> dict[str, Any]:
        suggestion = searcher.suggest(trial_id)
        assert isinstance(suggestion, dict), "it always suggests something"
        return suggestion

    def tell(trial_id: str, value: float | None) -> None:
        if value is None:
            searcher.on_trial_complete(trial_id, None, error=True)
        else:
            searcher.on_trial_complete(trial_id, {METRIC: value})

    return count(suggest, tell)


def count(suggest: Suggest, tell: Tell) -> int:
    """Run the trials; return how many of those that count did not fit."""
    failed = 0
    for number in range(NUM_FIRST + NUM_COUNTED):
        values = suggest(str(number))
        if values["batch_size"] > FITTING:
            failed += number >= NUM_FIRST
            tell(str(number), None)
        else:
            value = -abs(math.log10(values["lr_mp"]) + 2) + 0.1 * math.log2(values["batch_size"])
            tell(str(number), value)
    return failed


if __name__ == "__main__":
    main()
