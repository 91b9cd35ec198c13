"""The configurations of a space: in Optuna's terms, and which others are near one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nanovlm.config.parameter import Parameter


def choices(parameter: Parameter) -> list[Any]:
    """Return the values of a choice: numbers ascending, others as the space has them."""
    values: list[Any] = list(parameter.values)
    return sorted(values) if parameter.is_ordered else values


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a searched key.

    Choices among numbers, such as batch sizes, become their indices in ascending order.
    """
    if parameter.is_ordered:
        return IntDistribution(0, len(parameter.values) - 1)
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.values)
    low, high = parameter.values
    log = parameter.kind.startswith("log_")
    if parameter.kind.endswith("int"):
        return IntDistribution(low, high, log=log)  # type: ignore[arg-type]
    return FloatDistribution(low, high, log=log)  # type: ignore[arg-type]


def distributions(parameters: Sequence[Parameter]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions of searched keys, by key."""
    return {parameter.key: distribution(parameter) for parameter in parameters}


def encode(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of searched keys as Optuna's parameters."""
    return {
        p.key: choices(p).index(values[p.key]) if p.is_ordered else values[p.key]
        for p in parameters
        if p.key in values
    }


def choose(parameters: Sequence[Parameter], draw: Callable[[Parameter], Any]) -> dict[str, Any]:
    """Return the values of the keys that are active, each from what `draw` gives for Optuna's."""
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.is_active(values):
            drawn = draw(parameter)
            values[parameter.key] = choices(parameter)[drawn] if parameter.is_ordered else drawn
    return values


def suggest(parameters: Sequence[Parameter], trial: optuna.Trial) -> dict[str, Any]:
    """Return the values of the searched keys that are active, as Optuna suggests them."""

    def draw(parameter: Parameter) -> Any:
        asked = distribution(parameter)
        if isinstance(asked, CategoricalDistribution):
            return trial.suggest_categorical(parameter.key, asked.choices)
        if isinstance(asked, IntDistribution):
            return trial.suggest_int(parameter.key, asked.low, asked.high, log=asked.log)
        assert isinstance(asked, FloatDistribution), f"{asked}: no such distribution"
        return trial.suggest_float(parameter.key, asked.low, asked.high, log=asked.log)

    return choose(parameters, draw)


def can_repeat(parameters: Sequence[Parameter]) -> bool:
    """Return whether two draws can be equal: not if a continuous key is in all of them."""
    return all(p.num_values is not None or p.when for p in parameters)


def nearest_first(
    parameters: Sequence[Parameter], values: Mapping[str, Any], draw: Callable[[Parameter], Any]
) -> Iterator[dict[str, Any]]:
    """Yield different configurations, those first that have the most values of the given one.

    All of a finite space come, so one that has not run is found after as many as have.

    Args:
        values: of the configuration to begin with.
        draw: gives the value of a continuous key that is not active there.
    """

    def extend(index: int, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if index == len(parameters):
            yield chosen
            return
        parameter = parameters[index]
        if not parameter.is_active(chosen):
            yield from extend(index + 1, chosen)
            return
        if parameter.key in values:
            start = values[parameter.key]
        else:
            start = draw(parameter) if parameter.num_values is None else parameter.values[0]
        for value in _outwards(parameter, start):
            yield from extend(index + 1, {**chosen, parameter.key: value})

    return extend(0, {})


def _outwards(parameter: Parameter, start: Any) -> Iterator[Any]:
    """Yield the values of a key, the nearest to `start` first; of a continuous key only that."""
    if parameter.num_values is None:
        yield start
        return
    ordered = choices(parameter)
    is_range = parameter.kind != "choice"
    index = start - ordered[0] if is_range else ordered.index(start)
    for distance in range(parameter.num_values):
        for near in {index - distance, index + distance}:
            if 0 <= near < parameter.num_values:
                yield ordered[0] + near if is_range else ordered[near]
