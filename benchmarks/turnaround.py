"""Time between trials: one TorchTrainer per trial, as in Ray's user guide, against warm workers.

    python benchmarks/turnaround.py                    # 5 and 20 trials; about 5 minutes
    python benchmarks/turnaround.py --recipe-trials 3 --warm-trials 10

Both sides run the same fake training (a sleep of 0.2 s before each of 8 reports) under the same
searcher and ASHA, one trial at a time, so that what is measured is everything else. The turnaround
of a trial is the time from the last report of the trial before it to the end of its first step,
both read from the clock of the worker.
"""

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from benchmarks.command_line import parser_of
from nanovlm.cluster.broker_state import Event
from nanovlm.cluster.ray_cluster import connect
from nanovlm.cluster.worker_groups import worker_groups
from nanovlm.config.space import load_space
from nanovlm.messages import Job, Report, TrialRecord
from nanovlm.resources import Resources
from nanovlm.results.summary import turnarounds
from nanovlm.search.plan import SearchPlan
from nanovlm.search.stages import Search
from nanovlm.training.meter import OnUpdate, ignore

NUM_REPORTS = 8
SECONDS_PER_REPORT = 0.2
SAMPLES_PER_REPORT = 100
NO_DATA = {part: {"folder": ""} for part in ("training", "benchmark")}
MILESTONES = (100, 200, 400)
SPACE = f"""
search: {{lr_mp: {{log_uniform: [1.0e-4, 1.0e-2]}}}}
scheduler: {{rungs: {len(MILESTONES) + 1}, reduction_factor: 2}}
"""


def fake_accuracy(learning_rate: float, report: int) -> float:
    return 1 - (learning_rate - 1e-3) ** 2 * 5e4 - 0.5 / (report + 1)


def recipe_worker(config: dict[str, Any]) -> None:
    """The training function of the per-trial TorchTrainer."""
    for report in range(NUM_REPORTS):
        time.sleep(SECONDS_PER_REPORT)
        samples_seen = (report + 1) * SAMPLES_PER_REPORT
        with Path(config["log"]).open("a") as file:
            file.write(json.dumps({"trial": config["trial"], "at": time.time()}) + "\n")
        if samples_seen in MILESTONES or report == NUM_REPORTS - 1:
            accuracy = fake_accuracy(config["lr_mp"], report)
            ray.train.report({"mmstar_accuracy": accuracy, "samples_seen": samples_seen})


def recipe_trial(config: dict[str, Any]) -> None:
    trial = tune.get_context().get_trial_id()
    TorchTrainer(
        recipe_worker,
        train_loop_config={**config, "trial": trial},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=f"train-trial_id={trial}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # as the guide does
        ),
    ).fit()


def run_recipe(num_trials: int, folder: Path) -> list[float]:
    """Return the turnarounds of the recipe, in seconds."""
    log = folder / "steps.jsonl"
    with connect(None):
        tune.Tuner(
            tune.with_resources(recipe_trial, {"node:__internal_head__": 0.001}),
            param_space={
                "lr_mp": tune.loguniform(1e-4, 1e-2),
                "log": str(log),
                "storage": str(folder),
            },
            tune_config=tune.TuneConfig(
                metric="mmstar_accuracy",
                mode="max",
                num_samples=num_trials,
                search_alg=OptunaSearch(sampler=optuna.samplers.TPESampler(seed=0)),
                scheduler=ASHAScheduler(
                    time_attr="samples_seen",
                    max_t=NUM_REPORTS * SAMPLES_PER_REPORT + 1,
                    grace_period=MILESTONES[0],
                    reduction_factor=2,
                ),
                max_concurrent_trials=1,
            ),
            run_config=tune.RunConfig(name="recipe", storage_path=str(folder), verbose=0),
        ).fit()
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [b["at"] - a["at"] for a, b in itertools.pairwise(steps) if a["trial"] != b["trial"]]


def fake_trial(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    started = time.perf_counter()
    for report in range(NUM_REPORTS):
        time.sleep(SECONDS_PER_REPORT)
        if report == 0:
            first_step_seconds = time.perf_counter() - started
        samples_seen = (report + 1) * SAMPLES_PER_REPORT
        is_final = report == NUM_REPORTS - 1
        if samples_seen in job.milestones or is_final:
            yield Report(
                samples_seen=samples_seen,
                step=report + 1,
                metrics={"mmstar_accuracy": fake_accuracy(job.config.lr_mp, report)},
                seconds=time.perf_counter() - started,
                first_step_seconds=first_step_seconds,
                is_final=is_final,
            )


def run_warm(num_trials: int, folder: Path) -> list[float]:
    """Return the turnarounds of this project, in seconds."""
    space_file = folder / "space.yaml"
    space_file.write_text(SPACE)
    space = load_space(space_file, {"budget.trials": num_trials, "confirm.top": 0})
    plan = SearchPlan(space, MILESTONES, NUM_REPORTS * SAMPLES_PER_REPORT, NO_DATA)
    results = folder / "results"
    ended: list[TrialRecord] = []

    def on_events(events: Sequence[Event]) -> None:
        records = [event for event in events if isinstance(event, TrialRecord)]
        ended.extend(record for record in records if record.end is not None)

    (results / "logs").mkdir(parents=True)
    Search(
        plan,
        results,
        on_start=lambda *_: None,
        on_events=on_events,
        concurrency=1,
        start_workers=functools.partial(worker_groups, run_trial=fake_trial),
    ).run()
    assert len(ended) == num_trials, f"{len(ended)} of {num_trials} trials ended"
    return turnarounds(ended)


def overheads(seconds: list[float]) -> list[float]:
    """Return the turnarounds without the first step, which is training."""
    return [value - SECONDS_PER_REPORT for value in seconds]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe-trials", type=int, default=5)
    parser.add_argument("--warm-trials", type=int, default=20)
    arguments = parser.parse_args()
    medians = {}
    for name, run, num_trials in (
        ("warm", run_warm, arguments.warm_trials),
        ("recipe", run_recipe, arguments.recipe_trials),
    ):
        with tempfile.TemporaryDirectory() as folder:
            seconds = overheads(run(num_trials, Path(folder)))
        medians[name] = statistics.median(seconds)
        print(
            f"{name}: {num_trials} trials, overhead a trial: median {medians[name]:.3f} s, "
            f"min {min(seconds):.3f} s, max {max(seconds):.3f} s"
        )
    print(f"ratio of the medians: {medians['recipe'] / medians['warm']:.0f}")


if __name__ == "__main__":
    main()
