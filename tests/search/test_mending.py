"""Files of a search that were lost: what is made up for is what was there."""

import json
from pathlib import Path

import optuna
import pytest

from nanovlm.cluster.worker_pool import StopSwitch
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.messages import End, TrialRecord
from nanovlm.pruning.pausing_halving import build_rungs
from nanovlm.pruning.successive_halving import StoppingHalving
from nanovlm.results.read import RUNGS_FILE, SEARCH_ID_FILE
from nanovlm.search import study as study_module
from nanovlm.search.resume import mend_search
from nanovlm.search.searcher import StudySearch
from tests.records import make_record, make_report

MILESTONES = (100, 300, 900)
VALUES = [(0.1, 0.5, 0.7, 0.8), (0.3, 0.4, 0.9, 0.95), (0.2, 0.1, 0.3, 0.4), (0.5, 0.6, 0.6, 0.7)]


def space_of(folder: Path, scheduler: str) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(
        "preset: digits\nsearch: {lr_mp: default}\n"
        f"scheduler: {{name: {scheduler}, type: stopping, rungs: 4, reduction_factor: 3}}\n"
    )
    return load_space(path)


def run_search(space: SearchSpace, folder: Path) -> tuple[list[TrialRecord], StoppingHalving]:
    """Let trials be judged, one after another; the last one fails after two reports."""
    rungs = build_rungs(space, MILESTONES, folder / RUNGS_FILE)
    assert isinstance(rungs, StoppingHalving)
    records = []
    for number, values in enumerate(VALUES):
        reports, end = [], End.COMPLETED
        for milestone, value in zip((*MILESTONES, 2700), values, strict=True):
            reports.append(make_report(milestone + 4, {"mmstar_accuracy": value}))
            if milestone in MILESTONES and not rungs.decide(number, milestone + 4, value).goes_on:
                end = End.PRUNED
                break
            if number == len(VALUES) - 1 and len(reports) == 2:
                rungs.withdraw(number)
                end = End.ERROR
                break
        reason = stop_reason(rungs, number)
        parameters = {"lr_mp": 0.001 * (number + 1)}
        records.append(
            make_record(number, end=end, reports=reports, reason=reason, parameters=parameters)
        )
    return records, rungs


def stop_reason(rungs: StoppingHalving, number: int) -> str | None:
    decisions = [d for d in rungs._decisions.values() if d.number == number and not d.goes_on]
    return decisions[0].reason if decisions else None


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "pasha"])
@pytest.mark.parametrize("lines_left", [None, 0, 1, -1, -4])
def test_trials_are_judged_as_before(
    tmp_path: Path, scheduler: str, lines_left: int | None
) -> None:
    space = space_of(tmp_path, scheduler)
    records, before = run_search(space, tmp_path)
    log = tmp_path / RUNGS_FILE
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:lines_left]))
    if lines_left is None:
        log.unlink()
    (note, *_) = mend_search(space, tmp_path, MILESTONES, records)
    assert RUNGS_FILE in note
    again = build_rungs(space, MILESTONES, log)
    assert isinstance(again, StoppingHalving)
    ours, theirs = ({k: v for k, v in r._rungs.items() if v} for r in (again, before))
    assert ours == theirs
    assert again._limit == before._limit
    for number in range(4, 9):
        value = 0.1 * (number - 3)
        one, other = (rungs.decide(number, 104, value) for rungs in (again, before))
        assert (one.goes_on, one.cutoff) == (other.goes_on, other.cutoff)
    assert [stop_reason(again, n) for n in range(3)] == [stop_reason(before, n) for n in range(3)]


def test_a_whole_log_stays_as_it_is(tmp_path: Path) -> None:
    space = space_of(tmp_path, "asha")
    records, _ = run_search(space, tmp_path)
    whole = (tmp_path / RUNGS_FILE).read_bytes()
    StudySearch(space, tmp_path, 1, StopSwitch(), MILESTONES, records)
    assert mend_search(space, tmp_path, MILESTONES, records) == []
    assert (tmp_path / RUNGS_FILE).read_bytes() == whole


@pytest.mark.parametrize("content", [None, "", "garbage"])
def test_the_id_is_found_in_the_study(tmp_path: Path, content: str | None) -> None:
    space = space_of(tmp_path, "none")
    records, _ = run_search(space_of(tmp_path, "asha"), tmp_path)
    StudySearch(space, tmp_path, 1, StopSwitch(), (), records)
    path = tmp_path / SEARCH_ID_FILE
    before = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert "found again" in " ".join(mend_search(space, tmp_path, (), records))
    assert path.read_text() == before
    searcher = StudySearch(space, tmp_path, 1, StopSwitch(), (), records)
    assert len(searcher.study.get_trials()) == len(records), "each once"


def test_of_several_searches_in_a_study_the_trials_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of two searches, here a storage in memory that both open."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(study_module, "open_database", lambda study: storage)
    records, _ = run_search(space_of(tmp_path, "asha"), tmp_path)
    text = (tmp_path / "space.yaml").read_text()
    (tmp_path / "space.yaml").write_text(
        f"{text}study: {{storage: postgresql://host/db, name: shared}}\n"
    )
    space = load_space(tmp_path / "space.yaml", {"scheduler.name": "none"})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    other = [make_record(r.number, end=r.end, reports=r.reports, parameters={"lr_mp": 0.05})
             for r in records]  # fmt: skip
    for folder, own in ((ours, records), (theirs, other)):
        folder.mkdir()
        StudySearch(space, folder, 1, StopSwitch(), (), own)
    before = (ours / SEARCH_ID_FILE).read_text()
    (ours / SEARCH_ID_FILE).unlink()
    assert "found again" in " ".join(mend_search(space, ours, (), records))
    assert (ours / SEARCH_ID_FILE).read_text() == before
    twin = tmp_path / "twin"  # with the same trials: nothing tells them apart
    twin.mkdir()
    StudySearch(space, twin, 1, StopSwitch(), (), records)
    (twin / SEARCH_ID_FILE).unlink()
    with pytest.raises(UserError, match=r"study\.id: is damaged or gone, and the study does not"):
        mend_search(space, twin, (), records)


def test_what_was_recovered_says_what_the_records_say(tmp_path: Path) -> None:
    space = space_of(tmp_path, "asha")
    records, _ = run_search(space, tmp_path)
    (tmp_path / RUNGS_FILE).unlink()
    mend_search(space, tmp_path, MILESTONES, records)
    lines = [json.loads(line) for line in (tmp_path / RUNGS_FILE).read_text().splitlines()]
    stopped = {line["number"]: line["reason"] for line in lines if line.get("goes_on") is False}
    ends = [record.end for record in records]
    assert ends[-1] is End.ERROR and {*ends[:-1]} == {End.PRUNED, End.COMPLETED}
    assert stopped == {r.number: r.reason for r in records if r.end is End.PRUNED}
