"""How long the trainings of an earlier search are beside those of this one.

Trainings are longer or shorter ones of the same kind if they are on the same data, of which one
search trains on fewer rows, or for fewer epochs. All else cannot be ordered by samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm.config.sources import config_values, flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.downloads import split_revision
from nanovlm.errors import UserError
from nanovlm.files import user_path
from nanovlm.messages import TrialRecord
from nanovlm.results.read import DATA_FILE, FolderReader

_SAME_LENGTH = 0.01
"""Share by which full trainings may differ in samples; the last step of an epoch depends on the
batch size."""

_DATA_KEYS = ("train_dataset_path", "train_dataset_name", "turns", "test_dataset_path")
"""What must be the same where the lengths differ."""


@dataclass(frozen=True)
class Lengths:
    """How long the trainings of an earlier search of another length are."""

    there: int
    """Samples of a full training."""
    here: int
    shares: Mapping[str, tuple[float, ...]]
    """By trial id: how far it had come there at each of its reports, 1 in full."""

    def __str__(self) -> str:
        last = [shares[-1] for shares in self.shares.values() if shares]
        num_full = sum(share >= 1 for share in last)
        return (
            f"its full trainings have {self.there} samples, {self.there / self.here:.2g} times "
            f"those here ({num_full} trials in full, {len(last) - num_full} shorter): the sampler "
            "finds out how much they tell"
        )


def is_as_long(samples: int, trial_samples: int) -> bool:
    """Return whether a training of so many samples is as long as one of `trial_samples`."""
    return abs(samples - trial_samples) <= _SAME_LENGTH * trial_samples


def find_lengths(
    space: SearchSpace,
    folder: str,
    records: Sequence[TrialRecord],
    full_samples: int | None,
    trial_samples: int,
    data: Mapping[str, Any],
) -> Lengths | None:
    """Return the lengths of an earlier search; None if it is as long as this one.

    Args:
        records: its trials that are learnt from, one at least.
        full_samples: of a full training there; None if no trial ran in full.
        trial_samples: of a full training here.
        data: what the data here was made from, as `data.json` has it.

    Raises:
        UserError: the lengths are unknown, or cannot be ordered; says why.
    """
    there = full_samples or _estimate(space, folder, records, trial_samples, data)
    if is_as_long(there, trial_samples):
        return None
    differing = _other_data(space, records[0].config)
    if differing:
        raise UserError(
            f"warm_start: {folder}: its full trainings of {there} samples cannot be ordered with "
            f"those of {trial_samples} here, for the data differ otherwise than in the number of "
            f"rows: {differing}. Take it out, or learn from a search of the same data with another "
            "data_cutoff_idx or other epochs"
        )
    return Lengths(there, trial_samples, _shares(folder, records, there))


def _estimate(
    space: SearchSpace,
    folder: str,
    records: Sequence[TrialRecord],
    trial_samples: int,
    data: Mapping[str, Any],
) -> int:
    """Return the samples of a full training in proportion to the data and the epochs."""
    before = FolderReader(user_path(folder)).data() or {}
    sides = ((before, records[0].config), (data, config_values(space.base)))
    try:
        there, here = (
            content["training"]["samples"] * config["epochs"] * (1 - config["val_ratio"])
            for content, config in sides
        )
    except KeyError:
        raise UserError(
            f"warm_start: {folder}: how long its trainings are is unknown, since none has run in "
            f"full, and {DATA_FILE} does not say how much data it had; take it out, or go on with "
            "that search until a trial has run in full"
        ) from None
    return round(trial_samples * there / here)


def _other_data(space: SearchSpace, config: Mapping[str, Any]) -> str:
    """Return what an earlier search trained on and was asked that is not so here."""
    ours, theirs = flat_values(config_values(space.base)), flat_values(config)
    return ", ".join(
        f"there {key}={theirs[key]!r}, here {ours[key]!r}"
        for key in _DATA_KEYS
        if key in theirs and _without_version(theirs[key]) != _without_version(ours[key])
    )


def _without_version(value: Any) -> Any:
    """Return a data set of the hub without its version, which may have changed in between."""
    return split_revision(value)[0] if isinstance(value, str) else value


def _shares(
    folder: str, records: Sequence[TrialRecord], there: int
) -> dict[str, tuple[float, ...]]:
    """Return how far each trial had come at its reports, by trial id.

    A report counts at its milestone, whatever the batch size was.
    """
    reader = FolderReader(user_path(folder))
    verdicts = [line for line in reader.decisions(()) if "number" in line]
    if reader.problems:
        raise UserError(*(f"warm_start: {problem}" for problem in reader.problems))
    milestones = {(line["number"], line["samples_seen"]): line["milestone"] for line in verdicts}

    def share(record: TrialRecord, place: int) -> float:
        if record.state == "completed" and place == len(record.reports) - 1:
            return 1.0
        seen = record.reports[place].samples_seen
        return min(1.0, milestones.get((record.number, seen), seen) / there)

    return {
        record.trial_id: tuple(share(record, place) for place in range(len(record.reports)))
        for record in records
    }
