"""What was left out of the training data, in numbers for terminal and report."""

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "over_long_turns": "over-long turns",
    "incomplete_turns": "incomplete turns",
    "rows_without_turns": "rows without turns",
    "rows_without_image": "rows without an image",
}


def count_left_out(training: Mapping[str, Any]) -> dict[str, int]:
    """Return how much of the training data was left out, by kind; kinds without any are left away.

    Args:
        training: of `data.json`, which may be an earlier version's.
    """
    subsets = training.get("subsets", {}).values()
    counts = {words: sum(subset.get(key, 0) for subset in subsets) for key, words in _KINDS.items()}
    bad = training.get("bad_rows", training.get("unreadable_images", ()))
    counts["unreadable rows"] = len(bad)
    return {words: number for words, number in counts.items() if number}
