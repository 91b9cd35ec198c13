"""The configurations of a space: how many there are, which have run, and which come next.

A configuration that has run is not run again: its record is the answer. Without a continuous key a
space has so many configurations and no more, and a search that has run them all is over.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanovlm.config.parameter import Parameter, count_configurations
from nanovlm.config.space import SearchSpace
from nanovlm.messages import End, TrialRecord

MOST_TRIES = 2
"""Of a configuration whose trials fail for no fault of its values."""

Values = Mapping[str, Any]
"""Of the searched keys that are active."""


def can_repeat(parameters: Sequence[Parameter]) -> bool:
    """Return whether two draws can be equal: not if a continuous key is in all of them."""
    return all(p.num_values is not None or p.when for p in parameters)


def nearest_first(
    parameters: Sequence[Parameter], values: Values, draw: Callable[[Parameter], Any]
) -> Iterator[dict[str, Any]]:
    """Yield different configurations, those first that have the most values of the given one.

    All of a finite space come, so one that has not run is found after as many as have.

    Args:
        values: of the configuration to begin with.
        draw: gives the value of a continuous key that is not active there.
    """

    def extend(place: int, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if place == len(parameters):
            yield chosen
            return
        parameter = parameters[place]
        if not parameter.is_active(chosen):
            yield from extend(place + 1, chosen)
            return
        if parameter.key in values:
            start = values[parameter.key]
        else:
            start = draw(parameter) if parameter.num_values is None else parameter.values[0]
        for value in _outwards(parameter, start):
            yield from extend(place + 1, {**chosen, parameter.key: value})

    return extend(0, {})


def _outwards(parameter: Parameter, start: Any) -> Iterator[Any]:
    """Yield the values of a key, the nearest to `start` first; of a continuous key only that."""
    if parameter.num_values is None:
        yield start
        return
    ordered: list[Any] = list(parameter.values)
    if parameter.is_ordered:
        ordered.sort()
    is_range = parameter.kind != "choice"
    place = start - ordered[0] if is_range else ordered.index(start)
    for distance in range(parameter.num_values):
        for near in {place - distance, place + distance}:
            if 0 <= near < parameter.num_values:
                yield ordered[0] + near if is_range else ordered[near]


class RunConfigurations:
    """Which configurations of a space have run, those that run now included.

    One that is infeasible, or was stopped by a comparison, has run. One whose trial failed
    otherwise may be tried again (MOST_TRIES), and one that the end of an earlier run of the search
    stopped as often as that happens.
    """

    def __init__(self, space: SearchSpace, records: Iterable[TrialRecord] = ()) -> None:
        """
        Args:
            records: trials that have ended.
        """
        self.num_all = count_configurations(space.parameters)
        self._run = set[frozenset[tuple[str, Any]]]()
        self._failures = Counter[frozenset[tuple[str, Any]]]()
        for record in records:
            if record.state == "failed" and not record.is_infeasible:
                self.fail(record.parameters)
            elif record.end is not None and record.end is not End.SEARCH_ENDED:
                self.begin(record.parameters)

    def has_run(self, values: Values) -> bool:
        """Return whether this configuration is not to be run again."""
        return _key(values) in self._run

    def begin(self, values: Values) -> None:
        """Take note that a trial of this configuration runs, or has run."""
        self._run.add(_key(values))

    def fail(self, values: Values) -> None:
        """Take note that its trial failed for no fault of its values."""
        key = _key(values)
        self._run.add(key)
        self._failures[key] += 1
        if self._failures[key] < MOST_TRIES:
            self._run.discard(key)

    @property
    def num_left(self) -> int | None:
        """How many have not run; None if there is no end to them."""
        return None if self.num_all is None else self.num_all - len(self._run)

    def reason_to_end(self) -> str | None:
        """Return why no trial is left to run, None if there are some."""
        if self.num_left != 0:
            return None
        all_of_them = f"all {self.num_all} configurations have"
        what = "its only configuration has" if self.num_all == 1 else all_of_them
        num_failed = sum(number >= MOST_TRIES for number in self._failures.values())
        failed = f", {num_failed} of them failed {MOST_TRIES} times" if num_failed else ""
        return f"the space is used up: {what} run{failed}"


def _key(values: Values) -> frozenset[tuple[str, Any]]:
    return frozenset(values.items())
