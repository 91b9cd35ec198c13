"""One trial from start to end: the only path, for a search as for a single run.

    for report in run_trial(job, Resources()):
        print(report.samples_seen, report.metrics["mmstar_accuracy"])

A trial gives the same numbers to the last bit wherever and after whatever it runs: on CPU, and with
`deterministic` on GPUs of one kind as long as its batches fit into their memory.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import config_values
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.data.samples import PreparedSamples
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.evaluation.benchmarks import MAIN, joint_metrics
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.evaluation.mmstar_result import ItemAnswer, MMStarResult
from nanovlm.evaluation.validation import validation_loss
from nanovlm.files import replace_text
from nanovlm.messages import Job, Report
from nanovlm.models.pretrained import check_backbone_weights
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import gather_objects, rank, world_size
from nanovlm.resources import Resources
from nanovlm.training.forward import choose_algorithms
from nanovlm.training.loop import Progress, never, num_steps, train
from nanovlm.training.meter import OnUpdate, UpdateTimer, ignore
from nanovlm.training.start import check_decoder_tokenizer, find_checkpoint
from nanovlm.training.state import SavedTrial, read_state, write_state
from nanovlm.training.steps import NonFiniteLossError

logger = logging.getLogger(__name__)


def run_trial(
    job: Job,
    resources: Resources,
    interrupted: Callable[[], bool] = never,
    on_update: OnUpdate = ignore,
) -> Generator[Report, None, None]:
    """Train and evaluate `job`; yield a report at each milestone and at the end.

    All workers of a trial run this together and get the same reports. Closing the generator stops
    the trial. Each report's answers to the benchmark go to `job.answers_file`, the final report's
    model to `job.output_dir`, and the state after each other report to `job.state_dir`, if there
    are such. A trial that finds its state there repeats the reports before it and continues.

    Args:
        interrupted: asked once an optimizer step whether to end.
        on_update: called about once a second with how far the trial is.

    Raises:
        UserError: the configuration, the data or the checkpoint cannot be used.
        TrialInterrupted: `interrupted()` was true.
        NonFiniteLossError: the loss, the gradient or a metric became NaN or infinite.
    """
    _set_up_worker(job.config, resources.device)
    started = time.perf_counter()
    resources.start_trial()
    config = job.config
    problems = ErrorCollector()
    with problems:
        model = resources.model(config, job.checkpoint)
        data = resources.data(config, model, job.checkpoint)
    _raise_together(problems.messages)
    saved = _find_state(job, resources)
    reports = [] if saved is None else list(saved.reports)
    if reports:
        started -= reports[-1].seconds
        logger.info("trial %s goes on after %d samples", job.trial_id, reports[-1].samples_seen)
    yield from reports
    total_steps = num_steps(config, data.train.epoch_size)
    updates = UpdateTimer(job.trial_id, config.batch_size, total_steps, on_update)
    trial = _Trial(job, resources, model, data.val, data.benchmarks, updates, started, reports)
    training = train(
        model,
        data.train,
        config,
        job.milestones,
        device=resources.device,
        interrupted=interrupted,
        on_step=updates.after_step,
        micro_batch_size=resources.micro_batch_size(config),
        start=None if saved is None else saved.training,
    )
    try:
        with closing(training):
            for progress in training:
                yield trial.report(progress)
    finally:
        model.zero_grad()
        if resources.device.type == "cuda":
            torch.cuda.empty_cache()  # for those that share the GPU


@dataclass
class _Trial:
    """A trial on its way, between its steps."""

    job: Job
    resources: Resources
    model: VisionLanguageModel
    val_samples: PreparedSamples
    benchmarks: Mapping[str, PreparedBenchmark]
    updates: UpdateTimer
    started: float
    """On the clock of `time.perf_counter`."""
    reports: list[Report]
    """Those that were made."""

    def report(self, progress: Progress) -> Report:
        """Evaluate the model and write down what is wanted; all workers do this together."""
        job, resources, device = self.job, self.resources, self.resources.device
        trained_at = time.perf_counter()
        self.updates.evaluation_begins()
        results = {
            name: evaluate_mmstar(
                self.model,
                benchmark,
                resources.tokenizer(job.config.vlm),
                job.config.mmstar_batch_size,
                device,
                job.config.mmstar_rules,
            )
            for name, benchmark in self.benchmarks.items()
        }
        metrics = joint_metrics(job.config, results)
        if len(self.val_samples):
            metrics["val_loss"] = validation_loss(self.model, self.val_samples, device)
        evaluated_at = time.perf_counter()
        _check_finite(progress.step, metrics)
        if rank() == 0 and job.answers_file is not None:
            replace_text(Path(job.answers_file), results[MAIN].json_lines())
        if rank() == 0 and job.output_dir is not None and progress.is_final:
            self.model.save_pretrained(job.output_dir)
        report = Report(
            samples_seen=progress.samples_seen,
            step=progress.step,
            metrics=metrics | {"train_loss": progress.train_loss},
            seconds=time.perf_counter() - self.started,
            first_step_seconds=progress.first_step_at - self.started,
            evaluation_seconds=evaluated_at - trained_at,
            speed=progress.speed,
            is_final=progress.is_final,
            notes=tuple(dict.fromkeys(chain.from_iterable(gather_objects(resources.notes)))),
        )
        self.reports.append(report)
        if job.state_dir is not None and not progress.is_final:
            state = progress.state()  # which all workers ask for
            if rank() == 0:
                write_state(Path(job.state_dir), state, self.reports, _belongs_to(job))
        self.updates.training_goes_on()
        return report


def _belongs_to(job: Job) -> dict[str, Any]:
    """Return what a trial must have in common with another one to continue from its state."""
    return config_values(job.config) | {
        "milestones": list(job.milestones),
        "checkpoint": job.checkpoint,
        "workers": world_size(),
    }


def _find_state(job: Job, resources: Resources) -> SavedTrial | None:
    """Return the state that the trial continues from; all workers find the same, or none."""
    if job.state_dir is None:
        return None
    found = read_state(Path(job.state_dir), _belongs_to(job))
    saved = found if isinstance(found, SavedTrial) else None
    obstacles = [o for o in gather_objects(found if isinstance(found, str) else None) if o]
    steps = gather_objects(None if saved is None else saved.training.step)
    if len(set(steps)) > 1 and not obstacles:
        obstacles = [f"the workers find different states in {job.state_dir}"]
    if obstacles:
        resources.note(f"started from the beginning: {obstacles[0]}")
        return None
    return saved


def _raise_together(messages: Sequence[str]) -> None:
    """Raise UserError on all workers if one of them has messages: none waits for it in vain."""
    found = next(filter(None, gather_objects(tuple(messages))), ())
    if found:
        raise UserError(*found)


def check_start(config: TrainConfig) -> None:
    """Raise UserError if what a trial of `config` begins with is not there.

    For a program, before it starts anything; `run_trial` checks it by itself.
    """
    if config.resume_from_vlm_checkpoint:
        find_checkpoint(config.vlm.vlm_checkpoint_path, config.vlm)


def check_backbones(config: TrainConfig) -> None:
    """Raise UserError if the pretrained weights that `config` wants are missing or do not fit.

    Apart from `check_start`, since it takes too long for every trial of a search.
    """
    if config.vlm.vlm_load_backbone_weights and not config.resume_from_vlm_checkpoint:
        check_backbone_weights(config.vlm)
        check_decoder_tokenizer(config.vlm)


def metric_names(config: TrainConfig, resources: Resources) -> tuple[str, ...]:
    """Return the names of the metrics that every report of a trial will carry."""
    unanswered = {
        name: MMStarResult.of(benchmark, [ItemAnswer("", "A", 0.0)] * len(benchmark))
        for name, benchmark in resources.benchmarks(config).items()
    }
    _, val_samples = resources.training_data(config)
    answers = joint_metrics(config, unanswered)
    return (*answers, *(["val_loss"] if len(val_samples) else []), "train_loss")


def _set_up_worker(config: TrainConfig, device: torch.device) -> None:
    """Seed every generator, and fix what else a result may depend on."""
    seed = int(np.random.SeedSequence([config.seed, rank()]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    choose_algorithms(config, device)
    torch.backends.cudnn.allow_tf32 = False  # float32, in evaluation, is float32 on GPUs too
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raise NonFiniteLossError if the step before the report has spoilt the weights."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(step, name, value)
