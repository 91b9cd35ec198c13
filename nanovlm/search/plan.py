"""What a search will do, before it starts: data, milestones, what it learns from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanovlm.config.database_url import fill_in
from nanovlm.config.metrics import COSTS, is_score, natural_mode
from nanovlm.config.search_settings import Objective
from nanovlm.config.space import SearchSpace
from nanovlm.data.build import OnProgress, log_progress
from nanovlm.data.sources import pin_data
from nanovlm.errors import UserError, did_you_mean
from nanovlm.resources import Resources
from nanovlm.search.confirm import with_holdout
from nanovlm.search.warm_start import EarlierTrials, compare_lengths, read_earlier_trials
from nanovlm.training.loop import full_budget
from nanovlm.trial import check_backbones, check_start, metric_names
from nanovlm.watch.wandb_runs import check_wandb


@dataclass(frozen=True)
class SearchPlan:
    """What a search will do."""

    space: SearchSpace
    """With the version of each data set of the hub, and what its trials are asked."""
    milestones: tuple[int, ...]
    """Samples seen at which trials report and are compared, before the end."""
    trial_samples: int
    """Samples that a trial of full length sees, at most."""
    data: Mapping[str, Any]
    """What the data was made from and what was left out of it; JSON."""
    earlier_trials: tuple[EarlierTrials, ...] = ()
    """Of other searches, for the sampler to learn from."""

    def describe(self) -> str:
        """Return the plan in a line, and one for each earlier search that it learns from."""
        at = ", ".join(str(milestone) for milestone in self.milestones)
        compared = f", compared at {at}" if at else ""
        config = replace(self.space.base, batch_size=self.space.batch_sizes()[1])
        is_cut = config.max_steps and self.trial_samples == config.max_steps * config.batch_size
        by = f" (max_steps={config.max_steps})" if is_cut else ""
        plan = f"{self.space.name}: trials of {self.trial_samples} samples{by}{compared}"
        return "\n".join([plan, *map(str, self.earlier_trials)])


def plan_search(space: SearchSpace, on_progress: OnProgress = log_progress) -> SearchPlan:
    """Return the plan of a search; prepares the data, since the milestones follow from its size.

    Args:
        on_progress: called while data is prepared.

    Raises:
        UserError: if the data cannot be had, is smaller than a batch or too small for the rungs, if
            no report will carry the objective, if an earlier search does not fit or its length
            cannot be ordered with that here, or if an environment variable of study.storage is not
            set.
    """
    if space.study.storage is not None:
        fill_in(space.study.storage)  # a variable that is not set is better missed now
    earlier_trials = read_earlier_trials(space)
    resources = Resources("cpu", on_progress)
    check_wandb(space.base)
    check_start(space.base)
    check_backbones(space.base)
    resources.tokenizer(space.base.vlm)
    space = with_holdout(replace(space, base=pin_data(space.base)))
    config = replace(space.base, batch_size=space.batch_sizes()[1])
    train_samples, _ = resources.training_data(config)
    _check_objective(space.objective, metric_names(config, resources))
    budget, data = full_budget(config, train_samples.epoch_size), resources.describe_data(config)
    return SearchPlan(
        space,
        plan_milestones(space, budget),
        budget,
        data,
        compare_lengths(space, earlier_trials, budget, data),
    )


def plan_milestones(space: SearchSpace, budget: int) -> tuple[int, ...]:
    """Return the samples seen at which trials report before the end, ascending.

    They are counted back from the full budget of a trial, so that the last comparison before the
    end always has the same distance to it: with `rungs: 4, reduction_factor: 3` trials are compared
    at 1/27, 1/9 and 1/3 of the budget, and the end is the fourth rung.

    Args:
        budget: samples that a trial of full length sees.

    Raises:
        UserError: if the first milestones lie closer together than the largest batch.
    """
    if space.scheduler.name == "none":
        return ()
    rungs, factor = space.scheduler.rungs, space.scheduler.reduction_factor
    first = budget // factor ** (rungs - 1)
    largest = space.batch_sizes()[1]
    if rungs > 1 and first < largest:
        most = 1 + max(0, math.floor(math.log(budget / largest, factor)))
        raise UserError(
            f"scheduler.rungs: the first milestone must be at least one batch of {largest} "
            f"samples, but {rungs} rungs with reduction_factor {factor} put it at {first} of the "
            f"{budget} samples of a full trial; choose at most {most} rungs, or train longer"
        )
    return tuple(first * factor**rung for rung in range(rungs - 1))


def _check_objective(objective: Objective, metrics: Sequence[str]) -> None:
    """Raise if no report will carry an objective, or if its mode looks for the worst trial."""
    scores = [name for name in metrics if is_score(name)]
    messages = list[str]()
    for index, each in enumerate(objective.all):
        where, metric, better = objective.location(index), each.metric, natural_mode(each.metric)
        usable = [*scores, *COSTS] if index else scores
        if metric not in usable:
            near = did_you_mean(metric, usable)
            messages.append(f"{where}.metric: no report has {metric!r} as a score.{near}")
        elif each.mode != better:
            messages.append(f"{where}.mode: must be {better!r} for {metric}, got {each.mode!r}")
    if messages:
        raise UserError(*messages)
