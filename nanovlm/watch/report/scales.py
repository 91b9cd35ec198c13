"""Each searched key on its own scale: where values lie, and the ticks beside them."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.config.parameter import Parameter
from nanovlm.messages import TrialRecord
from nanovlm.watch.report.figure import label, log_axis, log_ticks, tick_text
from nanovlm.watch.report.wording import setting

_GOLDEN = 0.6180339887498949
_JITTER = 0.32
"""Width of the strip over which the trials of one choice are spread, in steps of the axis."""


@dataclass(frozen=True)
class Scale:
    """Where the values of a searched key lie on an axis."""

    parameter: Parameter

    @property
    def key(self) -> str:
        return self.parameter.key

    @property
    def is_choice(self) -> bool:
        return self.parameter.kind == "choice"

    @property
    def is_log(self) -> bool:
        return self.parameter.kind in ("log_uniform", "log_int")

    @functools.cached_property
    def choices(self) -> list[Any]:
        """The choices; numbers in ascending order."""
        values = list(self.parameter.values)
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return sorted(values)
        return values

    @property
    def low(self) -> float:
        return float(self.parameter.values[0])  # type: ignore[arg-type]

    @property
    def high(self) -> float:
        return float(self.parameter.values[1])  # type: ignore[arg-type]

    def place(self, record: TrialRecord) -> float | None:
        """Return the trial's value, or of a choice its place; None where it has none of these."""
        value = record.parameters.get(self.key)
        if self.is_choice:
            return float(self.choices.index(value)) if self._is_choice(record) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return None if self.is_log and value <= 0 else float(value)

    def spread(self, record: TrialRecord) -> float | None:
        """Return the place, that of a choice moved a little so that trials do not cover others."""
        place = self.place(record)
        if place is None or not self.is_choice:
            return place
        return place + _JITTER * ((record.number * _GOLDEN) % 1 - 0.5)

    def height(self, record: TrialRecord) -> float | None:
        """Return the place as a share of the range, from 0 to 1."""
        place = self.place(record)
        if place is None:
            return None
        if self.is_choice:
            last = len(self.choices) - 1
            return place / last if last else 0.5
        return self._share(place)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places, as shares of the range, at which to write what values."""
        if self.is_choice:
            last = len(self.choices) - 1
            return [
                (place / last if last else 0.5, label(setting(choice)))
                for place, choice in enumerate(self.choices)
            ]
        if self.is_log:
            return [(self._share(t), tick_text(t)) for t in log_ticks(self.low, self.high)]
        step = (self.high - self.low) / 4
        return [(k / 4, tick_text(float(f"{self.low + k * step:.3g}"))) for k in range(5)]

    def axis(self) -> Mapping[str, Any]:
        """Return the plotly axis of the values."""
        title = {"text": label(self.key)}
        if self.is_choice:
            places = list(range(len(self.choices)))
            return {
                "title": title,
                "tickvals": places,
                "ticktext": [label(setting(choice)) for choice in self.choices],
                "range": [-0.5, len(places) - 0.5],
                "showgrid": False,
            }
        if self.is_log:
            return {"title": title, **log_axis(self.low, self.high)}
        pad = 0.04 * (self.high - self.low)
        return {"title": title, "range": [self.low - pad, self.high + pad], "nticks": 6}

    def _is_choice(self, record: TrialRecord) -> bool:
        return self.key in record.parameters and record.parameters[self.key] in self.choices

    def _share(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def scales(parameters: Sequence[Parameter]) -> list[Scale]:
    return [Scale(parameter) for parameter in parameters]
