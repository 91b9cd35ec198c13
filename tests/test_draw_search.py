"""The picture of a search: what stands where is what its records say."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.draw_search import _stretches, draw
from nanovlm.watch.report.folder import read_search
from nanovlm.watch.report.worker_time import Work
from tests.records import make_record, make_report
from tests.results.fake_records import add_paused, make_results


def work(leg: int, begun_at: float, ended_at: float) -> Work:
    """Return a leg of a trial that reports after 10, 30 and 90 seconds of work."""
    reports = [make_report(100 * s, {"m": 0.5}, seconds=float(s)) for s in (10, 30, 90)]
    record = make_record(3, "stopped", reports=reports)
    return Work(record, "group-0", begun_at, begun_at, ended_at, leg == 1, leg)


def test_a_report_ends_the_leg_that_it_was_made_in() -> None:
    # The first leg reports after 10 s and pauses; the second one reports twice. A leg begins with
    # the end of its first step, a second after its work.
    legs = [work(1, 101.0, 110.0), work(2, 501.0, 580.0)]
    assert sorted(_stretches(legs)) == [(101.0, 110.0, 0), (501.0, 520.0, 1), (520.0, 580.0, 2)]


def test_legs_and_reports_can_be_one_to_one() -> None:
    legs = [work(1, 101.0, 110.0), work(2, 201.0, 220.0), work(3, 301.0, 360.0)]
    assert sorted(_stretches(legs)) == [(101.0, 110.0, 0), (201.0, 220.0, 1), (301.0, 360.0, 2)]


def test_the_picture_has_a_line_for_each_trial(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "search", num_trials=12, confirms=False)
    add_paused(folder, [12, 13])
    search = read_search(folder)
    picture = ElementTree.fromstring(draw(search))
    shapes = Counter(element.get("class") for element in picture)
    states = Counter(record.state for record in search.trials)
    in_legend = 1
    assert shapes["full"] == states["completed"] + in_legend > 1
    assert shapes["over"] == states["stopped"] + states["failed"] + in_legend > 1
    assert shapes["wait"] == sum(len(r.legs) - 1 for r in search.trials) + in_legend == 2
    texts = [element.text for element in picture]
    assert [str(number) in texts for number in range(14)] == [True] * 14
