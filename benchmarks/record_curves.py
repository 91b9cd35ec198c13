"""Trains random configurations of the digits space in full and records their learning curves.

    python benchmarks/record_curves.py --trials 160
    python benchmarks/record_curves.py --trials 60 --out data/digits_third.jsonl epochs=1

`benchmarks/replay.py` replays what is recorded. A trial that the file has already is not trained
again, so the command may be interrupted and given again with more trials. The numbers do not
depend on the machine's load: time plays no part in them.
"""

import argparse
import functools
import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanovlm.config.sources import parse_overrides
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.training.steps import NonFiniteLossError
from nanovlm.trial import run_trial

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "search_spaces" / "digits.yaml"
CURVES = ROOT / "benchmarks" / "data" / "digits_curves.jsonl"

PARTS_OF_THE_BUDGET = (27, 16, 9, 8, 4, 3, 2)
"""A report at one of so many parts of the full budget: the rungs of factor 2, 3 and 4."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=CURVES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as epochs=1")
    arguments = parser.parse_intermixed_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.touch()
    recorded = {json.loads(line)["number"] for line in arguments.out.read_text().splitlines()}
    wanted = [number for number in range(arguments.trials) if number not in recorded]
    overrides = parse_overrides(arguments.overrides)
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes) as pool, arguments.out.open("a") as file:
        record_one = functools.partial(record, overrides=overrides)
        for curve in pool.imap_unordered(record_one, wanted):
            file.write(json.dumps(curve) + "\n")
            file.flush()
            print(curve, flush=True)


def record(number: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a random configuration and its accuracy by samples seen.

    Args:
        overrides: keys of the base that are otherwise than in the space file.
    """
    space = load_space(SPACE, overrides)
    parameters = draw(space, number)
    config = space.config_for(parameters)
    resources = Resources("cpu")
    budget = config.epochs * len(resources.training_data(config)[0])
    job = Job(
        trial_id=f"curve-{number}",
        config=config,
        milestones=tuple(budget // part for part in PARTS_OF_THE_BUDGET),
    )
    curve: dict[str, Any] = {"number": number, "parameters": parameters, "budget": budget}
    reports = curve["reports"] = []
    try:
        for report in run_trial(job, resources):
            accuracy = report.metrics["mmstar_accuracy"]
            reports.append([report.samples_seen, round(accuracy, 6)])
    except NonFiniteLossError as error:
        curve["failure"] = str(error)
    return curve


def draw(space: SearchSpace, number: int) -> dict[str, Any]:
    """Return values that are uniform over the space, each on its own scale."""
    random = np.random.default_rng([0, number])
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if parameter.kind == "choice":
            values[parameter.key] = parameter.values[random.integers(len(parameter.values))]
            continue
        assert parameter.kind == "log_uniform", f"{parameter.key}: {parameter.kind} is not drawn"
        low, high = np.log(np.array(parameter.values, dtype=float))
        values[parameter.key] = float(np.exp(random.uniform(low, high)))
    return values


if __name__ == "__main__":
    main()
