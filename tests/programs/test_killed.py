"""Killing the program at any moment loses nothing."""

from pathlib import Path

import pytest

from benchmarks.killed import compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_search_that_is_killed_and_resumed_is_the_undisturbed_one(tmp_path: Path) -> None:
    assert compare(tmp_path, num_kills=2, num_trials=6, seed=1) == []
