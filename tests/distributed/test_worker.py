"""What a worker tells of a trial besides its reports."""

import pytest

from nanovlm.distributed.worker import seconds_to_first_step
from tests.records import make_report


@pytest.mark.parametrize(
    ("index", "seconds"),
    [(0, 3.0), (1, 3.0), (2, 0.5), (3, 0.5)],
    ids=["first", "same leg", "made after a pause", "same leg as that"],
)
def test_the_first_step_is_told_from_the_start_of_the_leg(index: int, seconds: float) -> None:
    times = [(3.0, 10.0), (3.0, 20.0), (20.5, 30.0), (20.5, 40.0)]
    reports = [make_report(0, {}, first_step_seconds=first, seconds=end) for first, end in times]
    assert seconds_to_first_step(reports[index], reports[:index]) == seconds
