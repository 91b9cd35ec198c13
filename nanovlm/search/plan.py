"""What a search is made up to be before it starts: data, milestones, what it learns from."""

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
from nanovlm.samplers.optuna_samplers import check_sampler
from nanovlm.search.confirm import with_holdout
from nanovlm.search.scheduler import plan_milestones
from nanovlm.search.warm_start import EarlierTrials, compare_lengths, read_earlier_trials
from nanovlm.trial import check_backbones, check_start, metric_names
from nanovlm.watch.wandb_runs import check_wandb


@dataclass(frozen=True)
class SearchPlan:
    """What a search was made up to be, before it starts."""

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
        plan = f"{self.space.name}: trials of {self.trial_samples} samples{compared}"
        return "\n".join([plan, *map(str, self.earlier_trials)])


def plan_search(space: SearchSpace, on_progress: OnProgress = log_progress) -> SearchPlan:
    """Return the plan of a search; prepares the data, since the milestones follow from its size.

    Args:
        on_progress: told how far it is when data has to be prepared.

    Raises:
        UserError: if the data cannot be had, is smaller than a batch or too small for the rungs, if
            no report will carry the objective, if the sampler lacks a package, if an earlier search
            does not fit or its length cannot be ordered with that here, or if an environment
            variable of study.storage is not set.
    """
    if space.study.storage is not None:
        fill_in(space.study.storage)  # a variable that is not set is better missed now
    check_sampler(space.sampler)
    earlier_trials = read_earlier_trials(space)
    resources = Resources("cpu", on_progress)
    check_wandb(space.base)
    check_start(space.base)
    check_backbones(space.base)
    resources.tokenizer(space.base.vlm.lm_tokenizer)
    space = with_holdout(replace(space, base=pin_data(space.base)))
    config = replace(space.base, batch_size=space.batch_sizes()[1])
    train_samples, _ = resources.training_data(config)
    _check_objective(space.objective, metric_names(config, resources))
    budget, data = config.epochs * len(train_samples), resources.describe_data(config)
    return SearchPlan(
        space,
        plan_milestones(space, budget),
        budget,
        data,
        compare_lengths(space, earlier_trials, budget, data),
    )


def _check_objective(objective: Objective, metrics: Sequence[str]) -> None:
    """Raise if no report will carry an objective, or if its mode looks for the worst trial."""
    scores = [name for name in metrics if is_score(name)]
    messages = list[str]()
    for place, each in enumerate(objective.all):
        where, metric, better = objective.location(place), each.metric, natural_mode(each.metric)
        usable = [*scores, *COSTS] if place else scores
        if metric not in usable:
            near = did_you_mean(metric, usable)
            messages.append(f"{where}.metric: no report has {metric!r} as a score.{near}")
        elif each.mode != better:
            messages.append(f"{where}.mode: must be {better!r} for {metric}, got {each.mode!r}")
    if messages:
        raise UserError(*messages)
