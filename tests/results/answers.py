"""Made-up answers to a benchmark, in the file that a trial writes."""

import json
from collections.abc import Mapping
from pathlib import Path


def write_answers(path: Path, answers: Mapping[int, bool]) -> Path:
    """Write which questions were answered rightly, as `MMStarResult.json_lines` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "index": index,
            "answer": "A",
            "output": "A" if correct else "B",
            "correct": correct,
            "letter": "A" if correct else "B",
            "letter_nll": 1.0,
        }
        for index, correct in answers.items()
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
