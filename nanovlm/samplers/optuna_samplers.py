"""Optuna's samplers, as this project uses them: seeded for each trial, and never in the way.

A sampler of its own for each trial, seeded by the trial's number, makes a search that was
interrupted suggest what the undisturbed one would have.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from nanovlm.config.parameter import Parameter
from nanovlm.config.space import SearchSpace
from nanovlm.samplers.configurations import (
    can_repeat,
    choose,
    distribution,
    distributions,
    encode,
    nearest_first,
)
from nanovlm.samplers.history import (
    STORAGE_ERRORS,
    BestAndLatest,
    History,
    OneBudget,
    Scalarized,
    WorstForInfeasible,
    looks_infeasible,
)
from nanovlm.samplers.milestone_sampler import MilestoneSampler
from nanovlm.samplers.optuna_compat import StudyView

logger = logging.getLogger(__name__)

HasRun = Callable[[Mapping[str, Any]], bool]
OnFailure = Callable[[Exception], None]

STARTUP_TRIALS = 10
"""Random trials before a model of the objective is asked, besides those that run meanwhile."""

_MOST_DRAWS = 8
"""While proposals have run before, and of TPE while they look infeasible: its model of the bad
trials is too wide to keep away from a region by itself. The last draw that looks so is taken as it
is, so no region is closed for ever."""


def build_history(space: SearchSpace) -> History | None:
    """Return what the samplers of a search are shown; None shows them all trials."""
    kinds = {"tpe": BestAndLatest, "gp": OneBudget, "cmaes": WorstForInfeasible}
    kind: type[History] | None = kinds.get(_kind(space))
    return None if kind is None else kind(space.objective.mode == "max", space.scheduler.pauses)


def build_sampler(
    space: SearchSpace,
    concurrency: int,
    number: int,
    history: History | None,
    has_run: HasRun = lambda values: False,
    on_failure: OnFailure = lambda error: None,
    milestones: Sequence[int] = (),
) -> BaseSampler:
    """Return the sampler for one trial of a space.

    Args:
        concurrency: of trials; while the first of them run there is nothing to learn from.
        number: of the trial; 0 is the default configuration.
        history: one for the whole search, see `build_history`.
        has_run: tells of a configuration whether it is not to be run again; there must be others.
        on_failure: called with each error of the sampler, after which a value is drawn at random.
        milestones: samples seen at which trials report before the end, ascending.
    """
    if number == 0:
        return _Fixed(encode(space.parameters, space.default_values()))
    learns = _kind(space) in ("auto", "tpe", "gp")
    seed = hash((space.sampler.seed, number)) % 2**32  # of integers: the same in every process
    if len(space.objective.all) > 1 and learns:
        history = Scalarized(space.objective, seed, build_history(space))
    relative = None if _is_conditional(space) else distributions(space.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner = _build(space, STARTUP_TRIALS + concurrency, seed, milestones)
    guarded = _Guarded(
        inner,
        seed,
        relative=relative if learns else None,
        history=history,
        # A Gaussian process learns it from the worst values, and the others do not look back.
        avoids_infeasible=_kind(space) == "tpe",
        on_failure=on_failure,
    )
    if not can_repeat(space.parameters):
        return guarded
    # A Gaussian process comes to the same configuration again, and takes its time for it.
    most_draws = 1 if _kind(space) in ("auto", "gp") else _MOST_DRAWS
    return _New({}, guarded, space.parameters, has_run, most_draws)


def _kind(space: SearchSpace) -> str:
    """Return which sampler it is; `auto` learns from keys that are always active."""
    name = space.sampler.name
    return "tpe" if name == "auto" and _is_conditional(space) else name


def _build(
    space: SearchSpace, num_startup: int, seed: int, milestones: Sequence[int]
) -> BaseSampler:
    kind, independent = _kind(space), RandomSampler(seed=seed)
    common: dict[str, Any] = {
        "independent_sampler": independent,
        "warn_independent_sampling": False,
    }
    if kind == "auto":
        return MilestoneSampler(
            seed,
            maximize=space.objective.mode == "max",
            milestones=milestones,
            reduction_factor=space.scheduler.reduction_factor,
            independent=independent,
        )
    if kind == "tpe":
        return TPESampler(
            seed=seed,
            multivariate=True,
            group=_is_conditional(space),
            constant_liar=True,
            n_startup_trials=num_startup,
        )
    if kind == "gp":
        return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, **common)
    if kind == "cmaes":
        return CmaEsSampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, consider_pruned_trials=True, **common
        )
    if kind == "qmc":
        # One sequence for the whole search, so the seed does not depend on the trial.
        return QMCSampler(seed=space.sampler.seed, scramble=True, **common)
    return independent


def _is_conditional(space: SearchSpace) -> bool:
    return any(parameter.when for parameter in space.parameters)


@dataclass(eq=False)
class _Fixed(BaseSampler):
    """Gives parameters that are known."""

    params: Mapping[str, Any]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict) -> dict:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self.params[param_name]


@dataclass(eq=False)
class _New(_Fixed):
    """Gives a configuration that has not run: drawn by another sampler, as often as need be.

    If each draw has run, which is so where the sampler is sure of the best one, it is the first
    that has not among those near the last draw.
    """

    inner: BaseSampler
    parameters: Sequence[Parameter]
    has_run: HasRun
    most_draws: int

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict:
        self.params = encode(self.parameters, self._new_values(study, trial))
        return {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        self.inner.after_trial(study, trial, state, values)

    def _new_values(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        together = self.inner.infer_relative_search_space(study, trial)
        for _ in range(self.most_draws):
            values = self._draw(study, trial, together)
            if not self.has_run(values):
                return values
        near = nearest_first(
            self.parameters, values, lambda parameter: self._draw_one(study, trial, parameter)
        )
        return next((other for other in near if not self.has_run(other)), values)

    def _draw(self, study: optuna.Study, trial: FrozenTrial, together: dict) -> dict[str, Any]:
        """Return the values that Optuna would get from the inner sampler."""
        drawn = self.inner.sample_relative(study, trial, together)
        return choose(
            self.parameters,
            lambda parameter: (
                drawn[parameter.key]
                if parameter.key in drawn
                else self._draw_one(study, trial, parameter)
            ),
        )

    def _draw_one(self, study: optuna.Study, trial: FrozenTrial, parameter: Parameter) -> Any:
        asked = distribution(parameter)
        if asked.single():
            return encode([parameter], {parameter.key: parameter.values[0]})[parameter.key]
        return self.inner.sample_independent(study, trial, parameter.key, asked)


@dataclass(eq=False)
class _Guarded(BaseSampler):
    """A sampler whose errors do not end the search: the trial is drawn at random instead."""

    inner: BaseSampler
    seed: int
    """Of what is drawn at random instead."""
    relative: dict[str, BaseDistribution] | None
    """The parameters that are drawn together; None lets the sampler find them out."""
    history: History | None
    """What the sampler learns from; None takes all trials."""
    avoids_infeasible: bool
    """Whether to draw again what looks infeasible."""
    on_failure: OnFailure

    @functools.cached_property
    def _fallback(self) -> BaseSampler:  # rarely wanted, and not made for nothing
        return RandomSampler(seed=self.seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict:
        if self.relative is not None:
            return {k: d for k, d in self.relative.items() if not d.single()}
        return self._try(
            lambda: self.inner.infer_relative_search_space(self._view(study), trial), dict
        )

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict) -> dict:
        return self._try(lambda: self._draw(self._view(study), trial, search_space), dict)

    def _draw(self, view: optuna.Study, trial: FrozenTrial, search_space: dict) -> dict:
        params = self.inner.sample_relative(view, trial, search_space)
        if not (self.avoids_infeasible and params):
            return params
        trials = view.get_trials(deepcopy=False)
        for _ in range(_MOST_DRAWS - 1):
            if not looks_infeasible(params, search_space, trials):
                break
            params = self.inner.sample_relative(view, trial, search_space)
        return params

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        arguments = (trial, param_name, param_distribution)
        return self._try(
            lambda: self.inner.sample_independent(self._view(study), *arguments),
            lambda: self._fallback.sample_independent(study, *arguments),
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._try(lambda: self.inner.before_trial(study, trial), lambda: None)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        with warnings.catch_warnings():
            # CMA-ES knows no constraints; it is shown a bad value instead (`WorstForInfeasible`).
            warnings.filterwarnings("ignore", "Constraints have been set")
            self._try(lambda: self.inner.after_trial(study, trial, state, values), lambda: None)

    def _view(self, study: optuna.Study) -> optuna.Study:
        if self.history is None:
            return study
        return StudyView(study, self.history(study.get_trials(deepcopy=False)))

    def _try(self, ask: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        try:
            return ask()
        except STORAGE_ERRORS:
            raise  # no fault of the sampler: the study is waited for
        except Exception as error:  # of a model of the objective, whatever it meets
            logger.warning("the sampler failed; this trial is drawn at random", exc_info=True)
            self.on_failure(error)
            return otherwise()
