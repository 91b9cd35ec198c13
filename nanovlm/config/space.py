"""The search space: what `run_search.py --space FILE` reads, checked as a whole.

A space is a `TrainConfig` (the base) and, for some of its keys, a range to search. All errors in
the file are reported together, before anything starts.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError as PydanticError
from pydantic_core import ErrorDetails

from nanovlm.config.database_url import hide_passwords
from nanovlm.config.parameter import (
    TUNABLE,
    Parameter,
    check_conditions,
    count_configurations,
    given_or_stand_in,
    read_parameters,
)
from nanovlm.config.schema import FROZEN_RATES, STAND_INS, TrainConfig
from nanovlm.config.search_settings import (
    ONE,
    SECTIONS,
    SETTINGS,
    SEVERAL,
    Budget,
    Confirm,
    Objective,
    Sampler,
    Scheduler,
    SpaceFile,
    Study,
    TrialResources,
)
from nanovlm.config.sources import (
    SPACES_DIR,
    Layer,
    LayersBelow,
    build_config,
    config_values,
    flat_values,
    preset_layer,
)
from nanovlm.config.yaml_text import read_mapping, write_yaml
from nanovlm.errors import ErrorCollector, UserError, did_you_mean, plain_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A checked search space."""

    name: str
    """The file's name without its ending; the default name of the results folder."""
    base: TrainConfig
    """Every key's value; of a searched key: the value that trial 0 and inactive conditions use."""
    parameters: tuple[Parameter, ...]
    """In an order in which a condition's parameter comes before what depends on it."""
    objective: Objective
    sampler: Sampler
    scheduler: Scheduler
    budget: Budget
    confirm: Confirm
    study: Study
    warm_start: tuple[str, ...]
    """Results folders of earlier searches."""
    resources: TrialResources

    def default_values(self) -> dict[str, Any]:
        """Return the searched keys' values of trial 0, the base configuration."""
        base, values = flat_values(config_values(self.base)), dict[str, Any]()
        for parameter in self.parameters:
            if parameter.is_active(values):
                values[parameter.key] = given_or_stand_in(parameter, base)
        return values

    def config_for(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration of a trial that the sampler gave these values."""
        return _with_values(self.base, values)

    def batch_sizes(self) -> tuple[int, int]:
        """Return the smallest and the largest batch that a trial may ask for, in samples."""
        searched = [value for p in self.parameters if p.key == "batch_size" for value in p.values]
        values: list[Any] = [self.base.batch_size, *searched]
        return min(values), max(values)

    @property
    def most_trials(self) -> int | None:
        """How many trials there can be, those aside that are tried again; None without limit."""
        limits = (self.budget.trials, count_configurations(self.parameters))
        return min((limit for limit in limits if limit is not None), default=None)

    def differences(self, other: "SearchSpace") -> list[str]:
        """Return the parts in which two spaces differ; the budget, the names and what only chooses
        from the results (bounds of objectives) are left aside."""
        ours, theirs = (
            {
                "base": space.base,
                "parameters": space.parameters,
                "objective": space.objective.without_bounds(),
                "sampler": space.sampler,
                "scheduler": space.scheduler,
            }
            for space in (self, other)
        )
        differing = [part for part in ours if ours[part] != theirs[part]]
        if self.resources.occupied() != other.resources.occupied():
            differing.append("resources")
        return differing

    def to_yaml(self) -> str:
        """Return the resolved space as a space file that gives the same space again."""
        content = {
            "preset": "nanovlm-222m",
            "base": config_values(self.base),
            "search": {parameter.key: parameter.to_yaml() for parameter in self.parameters},
            **{section: _plain(getattr(self, section)) for section in SETTINGS},
        }
        return write_yaml(content)


def find_space(path: Path) -> Path:
    """Return the path of the space file that a person means by `path`; see `load_space`."""
    shipped = SPACES_DIR / path.name
    is_shipped = path.parent == Path(SPACES_DIR.name) and shipped.exists()
    return shipped if is_shipped and not path.exists() else path


def load_space(
    path: Path, overrides: Mapping[str, Any] | None = None, below: LayersBelow = lambda layers: ()
) -> SearchSpace:
    """Return the space of a YAML file with the overrides of the command line.

    An override is a key of the file (`budget.trials`, `preset`, `search.lr_mp`) or a key of the
    base configuration (`epochs`, `vlm.lm_dropout`). For `below` see `build_config`.

    Args:
        path: a file, or `search_spaces/NAME.yaml` for a space that comes with the program.

    Raises:
        UserError: with a message for everything that is wrong.
    """
    path = find_space(path)
    source = str(path)
    sections, base_overrides = _apply(read_mapping(path), overrides or {})
    problems = ErrorCollector()
    settings, base = SpaceFile(search={"-": 0}), TrainConfig()
    with problems:
        settings = _read_settings(source, sections)
    with problems:
        base = build_config(
            preset_layer(str(sections.get("preset", settings.preset))),
            Layer(f"{source}: base", _mapping_or_empty(sections.get("base"))),
            Layer("command line", base_overrides),
            below=below,
        )
    with problems:
        parameters = _read_parameters(source, _mapping_or_empty(sections.get("search")), base)
    problems.raise_if_any()
    space = SearchSpace(
        name=path.stem,
        base=base,
        parameters=parameters,
        **{section: getattr(settings, section) for section in SETTINGS},
    )
    if messages := [f"{source}: {message}" for message in _contradictions(space)]:
        raise UserError(*messages)
    return space


def _read_settings(source: str, sections: Mapping[str, Any]) -> SpaceFile:
    try:
        return SpaceFile(**sections)
    except PydanticError as error:
        raise UserError(*(_describe(source, e) for e in error.errors())) from None


def _plain(section: Any) -> Any:
    if isinstance(section, tuple):
        return list(section)
    if isinstance(section, Objective):
        return section.to_yaml()
    return (section.without_password() if isinstance(section, Study) else section).model_dump()


def _mapping_or_empty(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}  # what it is instead is said elsewhere


def _apply(
    content: dict[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the file's sections with the overrides in place, and those meant for `base`."""
    sections = dict(content)
    base_overrides: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if section not in SECTIONS or (section == "base" and rest):
            base_overrides[key.removeprefix("base.")] = value
        elif rest:
            sections[section] = {**_section(sections, section, key), rest: value}
        else:
            sections[section] = value
    return sections, base_overrides


def _section(sections: Mapping[str, Any], section: str, key: str) -> dict[str, Any]:
    """Return the section that the override `key` sets a value of."""
    content = sections.get(section)
    if isinstance(content, dict):
        return content
    if content is not None or section in ("preset", "warm_start"):
        raise UserError(f"command line: {key}: {section} is not a mapping in which it could stand")
    return {}


def _read_parameters(
    source: str, search: Mapping[str, Any], base: TrainConfig
) -> tuple[Parameter, ...]:
    try:
        parameters = read_parameters(search)
    except PydanticError as error:
        raise UserError(*(_describe(source, e, "search") for e in error.errors())) from None
    problems = ErrorCollector()
    for parameter in parameters:
        with problems:
            _check_values(f"{source}: search.{parameter.key}", parameter, base)
    problems.raise_if_any()
    return check_conditions(source, parameters)


def _check_values(source: str, parameter: Parameter, base: TrainConfig) -> None:
    """Raise if a choice or an end of the range makes a configuration that cannot be."""
    for value in parameter.values:
        try:
            _with_values(base, {parameter.key: value})
        except PydanticError as error:
            rules = "; ".join(plain_rule(e["msg"]) for e in error.errors())
            raise UserError(f"{source}: {rules}, got {value!r}") from None


def _contradictions(space: SearchSpace) -> Iterator[str]:
    """Yield what cannot go together in the space."""
    defaults, num_objectives = space.default_values(), len(space.objective.all)
    for parameter in space.parameters:
        key = parameter.key
        if key in defaults and not parameter.contains(defaults[key]):
            yield (
                f"search.{key}: trial 0 runs the base configuration, whose {key}={defaults[key]!r} "
                f"is outside {parameter}; set base.{key} to a value inside, or widen it"
            )
    yield from _unused_rates(space)
    smallest, largest = space.batch_sizes()
    max_steps = space.base.max_steps
    if max_steps is not None and smallest < largest and space.scheduler.name != "none":
        yield (
            f"max_steps: {max_steps} steps are {max_steps * smallest} samples with "
            f"batch_size={smallest} and {max_steps * largest} with batch_size={largest}, while "
            f"scheduler.name={space.scheduler.name} compares trials at equal numbers of samples; "
            "limit epochs or data_cutoff_idx instead, take batch_size out of the search, or choose "
            "scheduler.name=none"
        )
    if smallest < space.resources.workers:
        yield (
            f"resources.workers: must not exceed the smallest batch_size={smallest}, "
            f"got {space.resources.workers}"
        )
    budget = space.budget.model_dump()
    limits = [name for name, value in budget.items() if value is not None]
    if not limits:
        yield f"budget: one of {', '.join(budget)} must be given"
    if limits == ["gpu_hours"] and not space.resources.gpus_per_worker:
        yield (
            "budget.gpu_hours: trials on CPU spend none, so the search would not end; "
            "give budget.trials or budget.hours, or resources.gpus_per_worker"
        )
    if space.sampler.name == "cmaes" and space.scheduler.pauses:
        yield (
            "sampler.name: cmaes learns from trials that have ended and not from those "
            "that pause; choose auto, tpe, gp, qmc or random, or scheduler.type=stopping"
        )
    if space.sampler.name == "cmaes" and num_objectives > 1:
        yield (
            f"sampler.name: cmaes follows a single objective, and there are {num_objectives}; "
            "choose auto, tpe, gp, qmc or random"
        )
    if space.scheduler.name == "pasha" and num_objectives > 1:
        yield (
            "scheduler.name: pasha goes by the gaps between values of a single objective, and "
            f"there are {num_objectives}; choose asha, hyperband or none"
        )
    metrics = [objective.metric for objective in space.objective.all]
    if "peak_memory_gib" in metrics[1:] and not space.resources.gpus_per_worker:
        yield (
            f"objective[{metrics.index('peak_memory_gib')}].metric: peak_memory_gib on the CPU is "
            "that of the whole process, earlier trials included; choose gflops_per_sample or "
            "seconds_per_sample, or resources.gpus_per_worker"
        )


def _unused_rates(space: SearchSpace) -> Iterator[str]:
    """Yield the searched learning rates that no trial would use."""
    searched = {parameter.key: parameter for parameter in space.parameters}
    freeze = space.base.freeze
    for key in FROZEN_RATES[freeze] if "freeze" not in searched else ():
        if key in searched:
            yield (
                f"search.{key}: no trial would use it, for freeze={freeze} freezes what it is for; "
                "take it out, or change freeze"
            )
    if "lr_backbones" in searched and all(_always_has(space, key) for key in STAND_INS):
        yield (
            "search.lr_backbones: no trial would use it, for both backbones have learning rates of "
            f"their own; take it out, or one of {' and '.join(STAND_INS)}"
        )


def _always_has(space: SearchSpace, key: str) -> bool:
    """Return whether `key` is not null in any trial."""
    in_base = getattr(space.base, key) is not None
    found = next((p for p in space.parameters if p.key == key), None)
    if found is None:
        return in_base
    return not found.contains(None) and (in_base or not found.when)


def _with_values(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    vlm = {k.removeprefix("vlm."): v for k, v in values.items() if k.startswith("vlm.")}
    train = {k: v for k, v in values.items() if not k.startswith("vlm.")}
    return dataclasses.replace(base, **train, vlm=dataclasses.replace(base.vlm, **vlm))


def _describe(source: str, error: ErrorDetails, *prefix: str) -> str:
    path = [*prefix, *(str(part) for part in error["loc"] if part not in (ONE, SEVERAL))]
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(path))
    if error["type"] == "missing":
        return f"{source}: {key}: must be given"
    if error["type"] == "extra_forbidden":
        if path[0] == "search":
            return f"{source}: {key}: this key cannot be searched.{did_you_mean(path[1], TUNABLE)}"
        section = SpaceFile.model_fields[path[0]].annotation if len(path) > 1 else SpaceFile
        section = Objective if len(path) > 1 and path[0] == "objective" else section
        known = section.model_fields if isinstance(section, type) else ()
        return f"{source}: unknown key {key!r}.{did_you_mean(path[-1], known)}"
    return (
        f"{source}: {key}: {plain_rule(error['msg'])}, got {hide_passwords(repr(error['input']))}"
    )
