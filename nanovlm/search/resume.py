"""Repairs lost or damaged files of a search before it is resumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovlm.cluster.relay import NUMBER, VALUES
from nanovlm.config.search_settings import Objective
from nanovlm.config.space import SearchSpace
from nanovlm.errors import UserError
from nanovlm.files import replace_text
from nanovlm.messages import RUN_ID, Report, TrialRecord, measured
from nanovlm.results.decisions import (
    PruningDecision,
    Withdrawal,
    decided_reports,
    decision_line,
    last_milestone,
)
from nanovlm.results.read import (
    CHECKPOINTS_DIR,
    RUNGS_FILE,
    SEARCH_ID_FILE,
    STUDY_FILE,
    TRIALS_FILE,
    FolderReader,
)
from nanovlm.search.study import open_study, read_search_id
from nanovlm.search.study_recorder import SEARCH

_Trials = dict[str, dict[int, Any]]
"""Values of a study's trials, by the id of their search and by number."""


def mend_search(
    space: SearchSpace, folder: Path, milestones: Sequence[int], records: Sequence[TrialRecord]
) -> list[str]:
    """Repair the rungs and the id of a search; return what was repaired, in a sentence each.

    Args:
        milestones: samples seen at which trials are compared.
        records: of the trials that have ended, in the order of their end.

    Raises:
        UserError: the id is lost, and the study does not tell which trials are this folder's.
    """
    notes = _mend_rungs(folder, milestones, records, space.objective)
    is_shared = space.study.storage is not None
    has_id = read_search_id(folder) is not None
    if has_id and is_shared:
        return notes
    location = open_study(space, folder)  # makes an id, which is no trial's, if there is none
    trials: _Trials = {}
    for trial in location.load().get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if SEARCH in attributes and VALUES in attributes:
            trials.setdefault(attributes[SEARCH], {})[attributes[NUMBER]] = attributes[VALUES]
    if not has_id:
        notes += _mend_search_id(folder, trials, records, is_shared)
    ours, ended = trials.get(read_search_id(folder) or "", {}), {r.number for r in records}
    path = space.study.without_password().storage or folder / STUDY_FILE
    if lost := ended - ours.keys():
        notes.append(f"{path}: lacked {len(lost)} trials; made up for from {TRIALS_FILE}")
    if begun := _with_state(folder) - ended - ours.keys():
        shown = ", ".join(map(str, sorted(begun)))
        notes.append(f"{path}: does not know trial {shown}, which was under way and begins again")
    return notes


def _with_state(folder: Path) -> set[int]:
    """Return the numbers of the trials that have a training state on disk."""
    names = [path.stem for path in (folder / CHECKPOINTS_DIR).glob("trial-*.state")]
    return {int(name.partition("-")[2]) for name in names if RUN_ID.fullmatch(name)}


def _mend_rungs(
    folder: Path, milestones: Sequence[int], records: Sequence[TrialRecord], objective: Objective
) -> list[str]:
    """Write lost decisions again from the reports and the ends of the trials.

    A record tells where its trial was compared and whether it went on. It does not tell what it was
    compared with, but that is not needed again.
    """
    reader = FolderReader(folder)
    decisions, withdrawn = reader.decisions(records) if milestones else ([], set())
    if not reader.problems:
        return []
    known = {(decision.number, decision.samples_seen) for decision in decisions}
    recovered = [
        _decision(record, report, objective, goes_on, milestones)
        for record in records
        if record.number not in withdrawn
        for report, goes_on in decided_reports(record)
        if (record.number, report.samples_seen) not in known
        and all(each.metric in measured(report) for each in objective.all)
    ]
    # The limit of pasha rises with the milestones, and stays where a failed trial has put it.
    recovered.sort(key=lambda decision: decision.milestone)
    failed = {record.number for record in records if record.state == "failed"}
    lines: list[PruningDecision | Withdrawal] = [*decisions, *recovered]
    lines += map(Withdrawal, sorted(withdrawn | failed))
    replace_text(folder / RUNGS_FILE, "".join(map(decision_line, lines)))
    return [
        f"{folder / RUNGS_FILE}: was damaged; {len(recovered)} decisions of ended trials were made "
        "up for from their reports; trials under way are compared again"
    ]


def _decision(
    record: TrialRecord,
    report: Report,
    objective: Objective,
    goes_on: bool,
    milestones: Sequence[int],
) -> PruningDecision:
    samples = report.samples_seen
    value, *others = objective.values_in(measured(report))
    return PruningDecision(
        record.number,
        last_milestone(milestones, samples) or milestones[0],
        samples,
        value,
        goes_on,
        (not goes_on and record.reason)
        or f"{'went on' if goes_on else 'was stopped'}; with what it was compared is lost",
        others=tuple(others),
    )


def _mend_search_id(
    folder: Path, trials: _Trials, records: Sequence[TrialRecord], is_shared: bool
) -> list[str]:
    """Find the id in the study: it is on each of this folder's trials."""
    path = folder / SEARCH_ID_FILE
    ended = {record.number: dict(record.parameters) for record in records}
    found = set(trials)
    if is_shared or len(found) > 1:  # there are those of other searches
        found = {
            search_id
            for search_id, values in trials.items()
            if ended and all(values.get(number) == ended[number] for number in ended)
        }
    if len(found) > 1:
        path.unlink()
        raise UserError(
            f"{path}: is damaged or gone, and the study does not tell which of its trials are of "
            "this folder; put back a copy of it, or search anew with this folder as `warm_start`"
        )
    if not found:
        return [f"{path}: was damaged or gone; a new one was made"] if records else []
    replace_text(path, found.pop())
    return [f"{path}: was damaged or gone; found again in the study"]
