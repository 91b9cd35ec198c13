"""A picture of a search whose trials pause, as SVG: which trial trained, paused and resumed when.

    python benchmarks/draw_search.py results/digits docs/images/search.svg

A line for each trial. A bar is training, darker after each milestone; dots are a pause; a trial
ends in full length or where it was stopped.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from nanovlm.watch.report.folder import SearchFolder, read_search
from nanovlm.watch.report.worker_time import Work, works

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 760, 18, 46, 70, 34, 40
BAR = '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="10" opacity="{:.2f}"/>'
LINE = '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
FULL = '<circle class="full" cx="{:.1f}" cy="{:.1f}" r="4.5"/>'
OVER = '<path class="over" d="M{:.1f} {:.1f}m-3 -3l6 6m0 -6l-6 6"/>'
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.page { fill: #ffffff } .bar { fill: #0b62c4 } .rule { stroke: #d0d7de }
.wait { stroke: #6e7781; stroke-width: 2; stroke-dasharray: 1 4; stroke-linecap: round }
.over { fill: none; stroke: #6e7781; stroke-width: 1.5 } .full { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117 } .bar { fill: #58a6ff } .rule { stroke: #30363d }
  .wait, .over { stroke: #8b949e } .full { fill: #f0883e }
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a results folder")
    parser.add_argument("picture", type=Path, help="the file to write")
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(read_search(arguments.folder)), encoding="utf-8")


def draw(search: SearchFolder) -> str:
    """Return the picture of a search of which at least one trial has ended."""
    done = [work for work in works(search) if not work.record.confirms]
    numbers = sorted({work.record.number for work in done})
    scale = (WIDTH - LEFT - RIGHT) / max(work.ended_at for work in done)
    height = TOP + ROW * len(numbers) + BOTTOM
    parts = [*_axis(60 * scale, height - BOTTOM + 4), *_legend(search.milestones)]
    for row, number in enumerate(numbers):
        legs = sorted((w for w in done if w.record.number == number), key=lambda w: w.leg)
        parts += _trial(legs, TOP + ROW * (row + 0.5), scale, search)
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"
aria-label="The trials of a search over time"><style>{STYLE}</style>
<rect class="page" width="{WIDTH}" height="{height}"/>"""
    return "\n".join([head, *parts, "</svg>\n"])


def _trial(legs: Sequence[Work], y: float, scale: float, search: SearchFolder) -> Iterator[str]:
    record = legs[0].record
    yield _text(LEFT - 10, y, str(record.number), "end")
    for before, after in itertools.pairwise(legs):
        ends = LEFT + before.ended_at * scale + 3, LEFT + after.begun_at * scale - 2
        yield LINE.format("wait", *ends, y, y)
    for begin, until, index in _stretches(legs):
        shade = (index + 1) / (len(search.milestones) + 1)
        yield BAR.format(LEFT + begin * scale, y - 5, (until - begin) * scale, shade)
    x = LEFT + legs[-1].ended_at * scale + 9
    yield {"completed": FULL, "paused": ""}.get(record.state, OVER).format(x, y)
    value = record.metrics.get(search.metric)
    yield _text(x + 9, y, record.state if value is None else f"{value:.2f}")


def _stretches(legs: Sequence[Work]) -> Iterator[tuple[float, float, int]]:
    """Yield begin and end of a trial's training before each of its reports, and the report's place.

    A report's `seconds` leave pauses out. It was made in the leg of the next report if that leg had
    begun by then; else the leg before ended with it.
    """
    reports, left = legs[0].record.reports, list(legs)
    until = legs[-1].ended_at
    for place in range(len(reports) - 1, -1, -1):
        spent = reports[place].seconds - (reports[place - 1].seconds if place else 0)
        begin = max(until - spent, left[-1].begun_at)
        if begin < until:
            yield begin, until, place
        until = begin
        if begin == left[-1].begun_at and len(left) > 1:
            left.pop()
            until = left[-1].ended_at


def _axis(minute: float, bottom: float) -> Iterator[str]:
    num_minutes = int((WIDTH - LEFT - RIGHT) / minute)
    for tick in range(0, num_minutes + 1, 1 + num_minutes // 8):
        x = LEFT + tick * minute
        yield LINE.format("rule", x, x, TOP, bottom)
        yield _text(x, bottom + 10, str(tick), "middle")
    yield _text(WIDTH / 2, bottom + 26, "minutes since the first trial began", "middle")


def _legend(milestones: Sequence[int]) -> Iterator[str]:
    x, y = float(LEFT), 15.0
    names = [*(f"to {milestone:,} samples" for milestone in milestones), "to the end"]
    for index, name in enumerate(names):
        yield BAR.format(x, y - 5, 18, (index + 1) / len(names)) + _text(x + 23, y, name)
        x += 38 + 6.3 * len(name)
    yield LINE.format("wait", x + 3, x + 16, y, y) + _text(x + 23, y, "paused")
    yield FULL.format(x + 84, y) + _text(x + 93, y, "full length")
    yield OVER.format(x + 172, y) + _text(x + 181, y, "stopped")


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
