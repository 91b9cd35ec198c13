"""Trains some configurations of the digits space in full on several seeds and records the answers.

    python benchmarks/record_seeds.py --seeds 8

How far the seeds of one configuration lie apart is what `benchmarks/confirm_race.py` draws from. A
run that the file has already is not trained again, so the command may be interrupted and given
again with more seeds. The numbers do not depend on the machine's load.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.record_curves import CURVES, SPACE
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.results.read import read_answers
from nanovlm.trial import run_trial

SEEDS = CURVES.with_name("digits_seeds.jsonl")

DEFAULT = "default"

RANKS = (0, 10, 20, 40)
"""Places among the recorded curves, by their end, of the configurations besides the default one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=SEEDS)
    arguments = parser.parse_args()
    space, resources = load_space(SPACE), Resources("cpu")
    configurations = {DEFAULT: space.default_values(), **_good_ones()}
    arguments.out.touch()
    recorded = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    done = {(run["configuration"], run["seed"]) for run in recorded}
    for seed in range(1, arguments.seeds + 1):
        for name, parameters in configurations.items():
            if (name, seed) in done:
                continue
            answers = train(space, resources, parameters, seed)
            run = {"configuration": name, "seed": seed, "answers": answers}
            with arguments.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(name, seed, f"{answers.count('1') / len(answers):.4f}", flush=True)


def train(space: SearchSpace, resources: Resources, parameters: dict[str, Any], seed: int) -> str:
    """Return a digit for each question of the benchmark, in the order of their numbers: 1 is a
    right answer."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "answers.jsonl")
        config = dataclasses.replace(space.config_for(parameters), seed=seed)
        job = Job(trial_id="seed", config=config, milestones=(), answers_file=str(file))
        for _ in run_trial(job, resources):
            pass
        answers = read_answers(file)
    return "".join(str(int(answers[item])) for item in sorted(answers))


def _good_ones() -> dict[str, dict[str, Any]]:
    curves = [json.loads(line) for line in CURVES.read_text().splitlines()]
    curves.sort(key=lambda curve: (-curve["reports"][-1][1], curve["number"]))
    return {f"place {rank}": curves[rank]["parameters"] for rank in RANKS}


if __name__ == "__main__":
    main()
