"""The report as a person sees it, in headless Chromium."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from nanovlm.files import replace_text
from nanovlm.results.read import SUMMARY_FILE
from nanovlm.watch.report.folder import read_search
from nanovlm.watch.report.page import render, write_report
from tests.browser import DRAWN, OpenPage, chromium, opened
from tests.results.fake_records import make_results, make_single

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- %{x}"
)

# What a page has drawn: of each chart its points, and the marks that stand for points in the page.
DRAWN_CHARTS = """
() => Object.fromEntries([...document.querySelectorAll('.plot')].map((plot) => [plot.id, {
    points: plot.data.map((t) => t.x.filter((x) => x !== null).length).reduce((a, b) => a + b, 0),
    marks: plot.querySelectorAll('.points path, .lines path, .point path').length,
}]))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_results(tmp_path_factory.mktemp("results") / "made-up", failure=HOSTILE)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def seen(browser: Browser, folder: Path) -> Iterator[OpenPage]:
    with opened(browser, folder / "report.html") as seen:
        yield seen


def overflow(seen: OpenPage) -> int:
    """Return by how many pixels the page is wider than the screen."""
    pixels: int = seen.run("document.documentElement.scrollWidth - innerWidth")
    return pixels


def test_nothing_is_complained_of_and_nothing_is_asked_for(seen: OpenPage, folder: Path) -> None:
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [
        (folder / "report.html").resolve().as_uri()
    ]


def test_every_chart_has_its_points(seen: OpenPage, folder: Path) -> None:
    records = read_search(folder).records
    drawn = seen.run(DRAWN_CHARTS)
    reports = sum(len(record.reports) for record in records)
    num_decided = sum(bool(record.reports) for record in records)
    assert set(drawn) == {
        "best-so-far", "learning-curves", "parallel", "importance", "capabilities", "workers",
        *(f"slice-{number}" for number in range(6)),
    }  # fmt: skip
    assert drawn["best-so-far"]["points"] >= len(records)
    assert drawn["learning-curves"]["points"] >= reports
    assert drawn["parallel"]["points"] >= 2 * 7 * num_decided  # lines, and dots to point at
    assert drawn["importance"]["points"] == 6
    assert drawn["slice-0"]["points"] == len(records)
    assert drawn["capabilities"]["points"] == 2 * 3
    assert drawn["workers"]["points"] >= len(records)
    assert all(chart["marks"] > 0 for chart in drawn.values()), drawn


def test_a_switch_changes_what_a_chart_shows(seen: OpenPage) -> None:
    title = "document.getElementById('learning-curves').layout.yaxis.title.text"
    assert seen.run(title) == "mmstar_accuracy"
    seen.page.click("[data-for=learning-curves] button:has-text('val_loss')")
    assert seen.run(title) == "val_loss"
    seen.page.click("[data-for=learning-curves] button:first-child")


def test_scales_are_logarithmic_where_the_key_is(seen: OpenPage) -> None:
    axes = seen.run(
        "[0, 1].map((k) => { const axis = document.getElementById(`slice-${k}`).layout.xaxis;"
        "return [axis.title.text, axis.type]; })"
    )
    assert axes[0] == ["lr_mp", "log"]
    assert axes[1][0] == "freeze" and axes[1][1] != "log"


def test_ticks_of_a_log_scale(seen: OpenPage) -> None:
    def ticks(low: float, high: float) -> list[str]:
        scale = json.dumps({"kind": "log", "low": low, "high": high})
        found = seen.run(f"charts.figure('x', {{traces: [], xaxis: {{scale: {scale}}}}}, {{}})")
        texts: list[str] = found["layout"]["xaxis"]["ticktext"]
        return texts

    assert ticks(1e-4, 0.03) == ["1e-4", "1e-3", "0.01"]
    assert ticks(1, 10) == ["1", "2", "5", "10"]
    assert ticks(2.2, 2.4) == ["2.2", "2.4"]
    assert ticks(0.0025, 3000) == ["0.01", "0.1", "1", "10", "100", "1,000"]


def column(seen: OpenPage, name: str) -> list[str]:
    """Return the cells of a column of the table of trials, from top to bottom."""
    heads = seen.page.locator("#trials-table th").all_text_contents()
    cells = seen.page.locator(f"#trials-table tbody td:nth-child({heads.index(name) + 1})")
    return cells.all_text_contents()


def test_the_table_is_sorted_by_any_column(seen: OpenPage) -> None:
    for name in ("trial", "mmstar_accuracy", "lr_mp"):
        button = f"#trials-table th button:text-is('{name}')"
        seen.page.click(button)
        ascending = [float(text.strip(" %")) for text in column(seen, name) if text != "–"]  # noqa: RUF001
        seen.page.click(button)
        descending = [float(text.strip(" %")) for text in column(seen, name) if text != "–"]  # noqa: RUF001
        assert ascending == sorted(ascending) and len(set(ascending)) > 5, name
        assert descending == sorted(descending, reverse=True), name
    assert column(seen, "lr_mp") != column(seen, "mmstar_accuracy")
    seen.page.click("#trials-table th button:text-is('mmstar_accuracy')")
    assert column(seen, "mmstar_accuracy")[-1] == "–", "what has no value comes last"  # noqa: RUF001
    seen.page.click("#trials-table th button:text-is('state')")
    states = [text.strip() for text in column(seen, "state")]
    assert states == sorted(states)
    seen.page.click("#trials-table th button:text-is('rank')")


def test_the_table_is_filtered(seen: OpenPage, folder: Path) -> None:
    records = read_search(folder).records
    num_failed = sum(record.state == "failed" for record in records)
    visible = "#trials-table tbody tr:visible"
    seen.page.click("[data-filter=failed]")
    assert seen.page.locator(visible).count() == len(records) - num_failed
    seen.page.click("[data-filter=failed]")
    seen.page.fill("#search-box", "window.hacked")
    assert seen.page.locator(visible).count() == num_failed
    seen.page.fill("#search-box", "")
    assert seen.page.locator(visible).count() == len(records)


def test_markup_in_a_reason_is_shown_as_it_is(seen: OpenPage) -> None:
    assert seen.run("window.hacked") is None
    assert HOSTILE in "\n".join(column(seen, "reason"))
    assert seen.page.locator("img").count() == 0


def test_a_pointer_shows_the_trial_with_its_reason_as_text(seen: OpenPage) -> None:
    text = seen.run(
        "JSON.parse(document.getElementById('report-data').textContent).hover['trial-0006']"
    )
    assert "trial 6" in text and "&lt;/script&gt;" in text and "<script" not in text
    texts = seen.run("document.getElementById('best-so-far').data.map((t) => t.hovertext || [])")
    assert text in [one for trace in texts for one in trace]


HOVER = """
(name) => {
    const plot = document.querySelector(`.plot#${name}`);
    const curve = plot.data.findIndex((trace) => trace.customdata);
    Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: 0 }]);
    const trial = plot.data[curve].customdata[0];
    return [trial, [...plot.querySelectorAll(".hoverlayer .hovertext")].map((e) => e.textContent)];
}
"""


@pytest.mark.parametrize(
    "name", ["best-so-far", "learning-curves", "parallel", "slice-0", "workers"]
)
def test_every_chart_of_trials_shows_the_one_under_the_pointer(seen: OpenPage, name: str) -> None:
    seen.page.locator(f".plot#{name}").scroll_into_view_if_needed()
    trial, (text,) = seen.page.evaluate(HOVER, name)
    assert f"trial {int(trial[-4:])}, " in text and "lr_mp" in text


def test_the_line_of_the_trial_under_the_pointer_is_over_the_others(seen: OpenPage) -> None:
    heights = seen.run(
        "(() => { const plot = document.getElementById('parallel');"
        "const data = plot.data.find((trace) => trace.customdata);"
        "plot.emit('plotly_hover', { points: [{ customdata: data.customdata[0], data }] });"
        "return [plot.data.at(-1).y, data.y.slice(0, 7)]; })()"
    )
    assert heights[0] == heights[1], "the objective and six keys"


def test_dark_and_light(browser: Browser, folder: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "document.getElementById('best-so-far').layout.font.color"
    with opened(browser, folder / "report.html", scheme="dark") as seen:
        dark = seen.run(background), seen.run(ink)
        seen.page.click("#theme")
        light = seen.run(background), seen.run(ink)
        seen.page.reload()
        seen.page.wait_for_selector(DRAWN, state="attached")
        assert (seen.run(background), seen.run(ink)) == light, "the choice outlives a reload"
    assert luminance(dark[0]) < 60 < 200 < luminance(light[0])
    assert dark[1] != light[1]
    assert seen.complaints == []


def luminance(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, folder: Path, width: int) -> None:
    with opened(browser, folder / "report.html", width=width) as seen:
        assert overflow(seen) == 0
        seen.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert overflow(seen) == 0
        cut = seen.run(
            "[...document.querySelectorAll('.card h2, .card .value, .note, .verdict p')]"
            ".filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
        )
        assert cut == []


def test_print_has_all_charts_in_light_colours(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "report.html", scheme="dark") as seen:
        seen.run("dispatchEvent(new Event('beforeprint'))")
        assert seen.run("document.documentElement.dataset.theme") == "light"
        assert all(chart["marks"] > 0 for chart in seen.run(DRAWN_CHARTS).values())
        widths = seen.run("[...document.querySelectorAll('.plot')].map((p) => p.layout.width)")
        assert max(widths) <= 700, "an A4 page has room for it"
        seen.run("dispatchEvent(new Event('afterprint'))")
        assert seen.run("document.documentElement.dataset.theme") == "dark"
        assert seen.page.pdf(format="A4").startswith(b"%PDF")
        assert seen.complaints == []


def write_running(folder: Path, **changes: Any) -> None:
    """Write the report of a running search, which loads itself again every second."""
    text = render(read_search(folder), reload_seconds=1)
    for name, value in changes.items():
        text = re.sub(rf'"{name}":[^,}}]*', f'"{name}":{json.dumps(value)}', text, count=1)
    replace_text(folder / "report.html", text)


def test_a_running_search_shows_its_newest_report(browser: Browser, tmp_path: Path) -> None:
    folder = make_results(tmp_path / "running", ended_by=None, confirms=False)
    write_running(folder)
    with opened(browser, folder / "report.html") as seen:
        assert seen.texts("#status-word") == ["Running"]
        assert seen.run(
            "document.getElementById('learning-curves').data.some((t) => t.name === 'running')"
        )
        seen.page.click("#trials-table th button:text-is('lr_mp')")
        order = column(seen, "lr_mp")
        seen.run("scrollTo(0, 1500)")
        summary = json.loads((folder / SUMMARY_FILE).read_text())
        (folder / SUMMARY_FILE).write_text(json.dumps({**summary, "ended_by": "budget.hours"}))
        write_report(folder)
        seen.page.wait_for_selector("#status[data-state=over]")
        seen.page.wait_for_selector(DRAWN, state="attached")
        assert seen.texts("#status-word") == ["Ended"]
        assert "budget.hours" in seen.texts("#status")[0]
        assert column(seen, "lr_mp") == order, "sorted as before"
        assert abs(seen.run("scrollY") - 1500) < 60, "where it was"
        num_loaded = len(seen.requests)
        seen.page.wait_for_timeout(2500)
        assert len(seen.requests) == num_loaded, "it is over: there is nothing more to come"
        assert seen.complaints == []


def test_a_search_that_was_killed_can_be_told(browser: Browser, tmp_path: Path) -> None:
    folder = make_results(tmp_path / "killed", ended_by=None, confirms=False)
    write_running(folder, writtenAt=1_700_000_000)
    with opened(browser, folder / "report.html") as seen:
        seen.page.click("#pause")
        assert seen.texts("#status-word") == ["No sign of life"]
        assert "may have been killed" in seen.texts("#age")[0]
        assert seen.texts("#next") == ["updates paused"]


def test_a_damaged_folder(browser: Browser, tmp_path: Path) -> None:
    folder = make_results(tmp_path / "damaged")
    for name in ("trials.jsonl", "summary.json", "space.yaml", "rungs.jsonl"):
        text = (folder / name).read_text()
        cut = text.rindex(":", 0, int(0.7 * len(text)))  # in a line: YAML may end after one
        (folder / name).write_text(text[: cut - 1])
    (folder / "data.json").unlink()
    write_report(folder)
    with opened(browser, folder / "report.html") as seen:
        notice = seen.texts("#missing")[0]
        for name in ("trials.jsonl", "summary.json", "space.yaml", "rungs.jsonl", "data.json"):
            assert name in notice
        assert all(chart["marks"] > 0 for chart in seen.run(DRAWN_CHARTS).values())
        assert seen.complaints == []


def test_a_single_run(browser: Browser, tmp_path: Path) -> None:
    folder = make_single(tmp_path / "single")
    write_report(folder)
    with opened(browser, folder / "report.html", width=390) as seen:
        assert set(seen.run(DRAWN_CHARTS)) == {"learning-curves", "capabilities"}
        assert seen.page.locator("#missing").count() == 0
        assert overflow(seen) == 0 and seen.complaints == []
