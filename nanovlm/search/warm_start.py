"""What the sampler learns from earlier searches before its own first trial.

An earlier search whose trainings are as long as those here adds trials of this search's own kind.
One whose trainings have another length is a source of its own. Trainings are longer or shorter ones
of the same kind if they are on the same data, of which one search trains on fewer rows, or for
fewer epochs or steps. All else cannot be ordered by samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanovlm.config.parameter import given_or_stand_in
from nanovlm.config.schema import MIN_RATING_KEYS, STAND_INS
from nanovlm.config.sources import config_values, earlier_values, flat_values
from nanovlm.config.space import SearchSpace
from nanovlm.downloads import split_revision
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.files import user_path
from nanovlm.messages import TrialRecord, measured
from nanovlm.results.read import DATA_FILE, TRIALS_FILE, FolderReader
from nanovlm.results.summary import mmstar_rules
from nanovlm.search.study_recorder import StudyRecorder

_SHOWN_DIFFERENCES = 5

_SAME_LENGTH = 0.01
"""Share by which full trainings may differ in samples; the last step of an epoch depends on the
batch size."""

_DATA_KEYS = (
    *("train_dataset_path", "train_dataset_name", "turns", "test_dataset_path"),
    *("more_benchmarks", "benchmark_weights"),
    *MIN_RATING_KEYS.values(),
)
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


@dataclass(frozen=True)
class EarlierTrials:
    """The trials of a results folder that fit a space."""

    folder: str
    records: tuple[TrialRecord, ...]
    """With the values that they have for the keys of this space."""
    left_out: Mapping[str, int]
    """How many trials were not taken, by the reason."""
    differences: tuple[str, ...]
    """Keys besides the searched ones that their configuration has otherwise."""
    notes: tuple[str, ...] = ()
    """What was damaged in the folder, and is left out."""
    full_samples: int | None = None
    """Samples of a full training there; None if no trial ran in full."""
    lengths: Lengths | None = None
    """Given if full trainings there have another length than here."""

    def __str__(self) -> str:
        total = len(self.records) + sum(self.left_out.values())
        parts = [f"warm start: {self.folder}: {len(self.records)} of {total} trials taken"]
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            parts.append(f" ({reasons})")
        if self.differences:
            more = len(self.differences) - _SHOWN_DIFFERENCES
            shown = ", ".join(self.differences[:_SHOWN_DIFFERENCES])
            parts.append(f"; there {shown}{f' and {more} more keys' if more > 0 else ''}")
        if self.lengths is not None:
            parts.append(f"; {self.lengths}")
        return "".join([*parts, *(f"; {note}" for note in self.notes)])


def read_earlier_trials(space: SearchSpace) -> tuple[EarlierTrials, ...]:
    """Return the trials of the space's `warm_start` folders.

    Raises:
        UserError: a folder holds no trials, or none that fits the space; says why.
    """
    problems = ErrorCollector()
    taken = list[EarlierTrials]()
    for name in space.warm_start:
        with problems:
            taken.append(_read(space, name))
    problems.raise_if_any()
    return tuple(taken)


def learn_from(
    recorder: StudyRecorder, earlier: Sequence[EarlierTrials], trial_samples: int
) -> None:
    """Add the trials of earlier searches to the study, each once, for the sampler to learn from.

    A trial that ran its full budget counts as a full one if that was as long as it is here, else as
    one that was stopped at its last report; `auto` takes it for a trial of another source.
    """
    for trials in earlier:
        source = str(user_path(trials.folder).resolve())
        for record in trials.records:
            is_full = _is_as_long(record.samples_seen, trial_samples)
            shares = None if trials.lengths is None else trials.lengths.shares[record.trial_id]
            recorder.add_imported(record, source, is_full, shares)


def compare_lengths(
    space: SearchSpace,
    earlier: Sequence[EarlierTrials],
    trial_samples: int,
    data: Mapping[str, Any],
) -> tuple[EarlierTrials, ...]:
    """Return the earlier trials with their lengths, where those are not the length here.

    Args:
        trial_samples: of a full training here.
        data: what the data here was made from, as `data.json` has it.

    Raises:
        UserError: lengths are unknown or cannot be ordered; says why.
    """
    problems = ErrorCollector()
    compared = list[EarlierTrials]()
    for trials in earlier:
        with problems:
            there = trials.full_samples or _estimate(space, trials, trial_samples, data)
            lengths = _lengths(space, trials, there, trial_samples)
            compared.append(replace(trials, lengths=lengths))
    problems.raise_if_any()
    return tuple(compared)


def _is_as_long(samples: int, trial_samples: int) -> bool:
    return abs(samples - trial_samples) <= _SAME_LENGTH * trial_samples


def _estimate(
    space: SearchSpace, trials: EarlierTrials, trial_samples: int, data: Mapping[str, Any]
) -> int:
    """Return the samples of a full training there in proportion to the data and its passes."""
    before = FolderReader(user_path(trials.folder)).data() or {}
    theirs, ours = trials.records[0].config, config_values(space.base)
    try:
        there, here = (
            content["training"]["samples"] * config["epochs"] * (1 - config["val_ratio"])
            for content, config in ((before, theirs), (data, ours))
        )
    except KeyError:
        raise UserError(
            f"warm_start: {trials.folder}: how long its trainings are is unknown, since none has "
            f"run in full, and {DATA_FILE} does not say how much data it had; take it out, or go "
            "on with that search until a trial has run in full"
        ) from None
    in_epochs = trial_samples * there / min(here, _most_samples(ours))
    return round(min(in_epochs, _most_samples(theirs)))


def _most_samples(config: Mapping[str, Any]) -> float:
    """Return the samples of `max_steps`."""
    max_steps = config.get("max_steps")
    return math.inf if max_steps is None else max_steps * config["batch_size"]


def _lengths(
    space: SearchSpace, trials: EarlierTrials, there: int, trial_samples: int
) -> Lengths | None:
    """Return the lengths of an earlier search; None if it is as long as this one."""
    if _is_as_long(there, trial_samples):
        return None
    ours = flat_values(config_values(space.base))
    theirs = earlier_values(trials.records[0].config)
    differing = ", ".join(
        f"there {key}={theirs[key]!r}, here {ours[key]!r}"
        for key in _DATA_KEYS
        if _without_version(theirs[key]) != _without_version(ours[key])
    )
    if differing:
        raise UserError(
            f"warm_start: {trials.folder}: its full trainings of {there} samples cannot be ordered "
            f"with those of {trial_samples} here, for the data differ otherwise than in the number "
            f"of rows: {differing}. Take it out, or learn from a search of the same data with "
            "another data_cutoff_idx, other epochs or max_steps"
        )
    return Lengths(there, trial_samples, _shares(trials, there))


def _without_version(value: Any) -> Any:
    """Return a data set of the hub without its version, which may have changed in between."""
    return split_revision(value)[0] if isinstance(value, str) else value


def _shares(trials: EarlierTrials, there: int) -> dict[str, tuple[float, ...]]:
    """Return how far each trial had come at its reports, by trial id.

    A report counts at its milestone, whatever the batch size was.
    """
    reader = FolderReader(user_path(trials.folder))
    decisions, _ = reader.decisions(())
    if reader.problems:
        raise UserError(*(f"warm_start: {problem}" for problem in reader.problems))
    milestones = {(d.number, d.samples_seen): d.milestone for d in decisions}

    def share(record: TrialRecord, seen: int) -> float:
        if record.state == "completed" and seen == record.samples_seen:
            return 1.0
        return min(1.0, milestones.get((record.number, seen), seen) / there)

    return {
        record.trial_id: tuple(share(record, report.samples_seen) for report in record.reports)
        for record in trials.records
    }


def _read(space: SearchSpace, name: str) -> EarlierTrials:
    reader = FolderReader(user_path(name))
    if not reader.has(TRIALS_FILE):
        raise UserError(f"warm_start: {name} is no results folder of a search (no {TRIALS_FILE})")
    records, _ = reader.ended()
    if reader.problems:
        raise UserError(*(f"warm_start: {problem}" for problem in reader.problems))
    taken, left_out = list[TrialRecord](), dict[str, int]()
    for record in records:
        values = _values(space, record.config)
        reason = _reason_against(space, record, values)
        if reason is None:
            taken.append(replace(record, parameters=values))
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    if not taken:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(
            f"warm_start: {name} has no trial that fits this space: {reasons or 'it is empty'}; "
            "take it out, or search the same keys over ranges that hold its values"
        )
    differences = _differences(space, taken[0].config)
    full = max((r.samples_seen for r in records if r.state == "completed"), default=None)
    return EarlierTrials(name, tuple(taken), left_out, differences, tuple(reader.notes), full)


def _values(space: SearchSpace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a trial's configuration has for the keys that are searched and active."""
    flat = flat_values(config)
    # Searches from before a key that may be null trained as with null.
    flat = dict.fromkeys(STAND_INS) | flat
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if parameter.is_active(values) and parameter.key in flat:
            values[parameter.key] = given_or_stand_in(parameter, flat)
    return values


def _reason_against(
    space: SearchSpace, record: TrialRecord, values: Mapping[str, Any]
) -> str | None:
    """Return why a trial cannot be taken, None if it can."""
    if record.state == "failed":
        return "failed"
    for objective in space.objective.all:
        if not all(objective.metric in measured(report) for report in record.reports):
            return f"without {objective.metric}"
    active: dict[str, Any] = {}
    for parameter in space.parameters:
        if not parameter.is_active(active):
            continue
        if parameter.key not in values:
            return f"without {parameter.key}"
        if not parameter.contains(values[parameter.key]):
            return f"with {parameter.key} outside {parameter}"
        active[parameter.key] = values[parameter.key]
    return None


def _differences(space: SearchSpace, theirs: Mapping[str, Any]) -> tuple[str, ...]:
    searched = {parameter.key for parameter in space.parameters}
    ours = flat_values(config_values(space.base))
    flat = {"mmstar_rules": mmstar_rules(theirs), **flat_values(theirs)}
    return tuple(
        f"{key}={flat[key]!r}"
        for key in ours
        if key not in searched and key in flat and flat[key] != ours[key]
    )
