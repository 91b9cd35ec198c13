"""What the report says of a results folder, its numbers, and bad input."""

import dataclasses
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm.errors import UserError
from nanovlm.results.folder import PACKAGES, describe_environment
from nanovlm.results.read import ENVIRONMENT_FILE
from nanovlm.watch.report.folder import read_search
from nanovlm.watch.report.page import render, rounded, write_report
from nanovlm.watch.report.result_charts import num_items
from nanovlm.watch.report.space_charts import (
    FEWEST_TRIALS,
    compare_at_milestone,
    importances,
    parameter_importance,
)
from nanovlm.watch.report.style import duration
from nanovlm.watch.report.worker_time import spent_time, works
from tests.results.fake_records import (
    BEGIN,
    FULL,
    NUM_GROUPS,
    SIZES,
    add_paused,
    make_results,
    make_single,
)
from tests.watch.pages import page_data, page_text, table_rows

REPOSITORY = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script> <!-- & %{x} \u2028"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("results") / "made-up")


def test_an_undamaged_folder_lacks_nothing(folder: Path) -> None:
    search = read_search(folder)
    assert search.missing == () and search.is_search
    assert search.ended_by == "budget.trials: all trials are done"
    assert search.milestones == [1000, 3000]
    assert len(search.records) == 24 and len(search.confirmed) == 4


def test_the_headline_is_that_of_the_summary(folder: Path) -> None:
    search = read_search(folder)
    summary = json.loads((folder / "summary.json").read_text())
    value, (low, high) = (
        summary["best"]["metrics"]["mmstar_accuracy"],
        summary["best"]["interval_95"],
    )
    text = page_text(render(search))
    assert f"Best mmstar_accuracy {100 * value:.1f} % 95 % interval" in text
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f} %" in text
    assert summary["mmstar_rules"] == "lmms-eval-0.7.2"
    assert "scored by lmms-eval-0.7.2" in text
    (gap,) = (
        c["difference_to_default"]
        for c in summary["confirmation"]["configurations"]
        if c["difference_to_default"]
    )
    assert f"Gain over the default {100 * gap['mean']:+.1f} points" in text
    assert "on 2 fresh seeds, p < 0.001" in text
    assert search.verdict and search.verdict[0][1:-1] == summary["confirmation"]["verdict"][1:]
    assert search.verdict[0] in text


@pytest.mark.parametrize("counts", [True, False])
def test_whether_a_gain_counts_is_not_read_off_the_sentence(folder: Path, counts: bool) -> None:
    search = read_search(folder)
    said = {**(search.confirmation or {}), "verdict": "it beats it", "gain_counts": counts}
    changed = dataclasses.replace(search, confirmation=said)
    assert changed.verdict == ("It beats it.", counts)
    assert ("More than chance" in render(changed)) == counts
    del said["gain_counts"]  # as earlier versions wrote it
    assert search.verdict is not None and changed.verdict == ("It beats it.", search.verdict[1])


def test_a_gain_that_is_not_confirmed_says_so(tmp_path: Path) -> None:
    search = read_search(make_results(tmp_path / "search", confirms=False))
    text = page_text(render(search))
    assert re.search(r"Gain over the default \+[\d.]+ points not confirmed on fresh seeds", text)
    assert search.verdict is None and "chance" not in text


def test_paused_trials_are_a_state_of_their_own(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "search", confirms=False)
    add_paused(folder, (24, 25, 26))
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    data = page_data(text)
    assert (
        "Interrupted" in text
        and "3 paused" in text
        and "mark-running" not in text.split("<body>")[1]
    )
    search = read_search(folder)
    assert not search.missing
    rows = [row for row in table_rows(text, "trials-table") if row[2] == "paused"]
    assert [int(row[1]) for row in rows] == [26, 25, 24], "the furthest first"
    assert all("below" in row[-1] for row in rows)
    charts = {chart["name"]: chart["variants"][0].get("traces") for chart in data["charts"]}
    (curves,) = (trace for trace in charts["learning-curves"] if trace["name"] == "paused")
    assert curves["x"] == [1000, None, 1000, None, 1000, 3000, None]
    assert not any(trace["name"] == "running" for trace in charts["learning-curves"])
    (bars,) = (trace for trace in charts["workers"] if trace["name"] == "paused")
    assert bars["text"] == ["24", "25", "26", "26 (2)"] and bars["y"][-1] == "group-1"
    assert "trial 26</b>, paused" in data["hover"]["trial-0026"]
    (slice_,) = (t for t in charts["slice-0"] if t["name"] == "paused")
    assert slice_["customdata"] == ["trial-0024", "trial-0025", "trial-0026"]
    assert spent_time(search)["paused"] == pytest.approx(3 * 3.8 + 8, abs=1e-3)


def test_the_table_has_every_trial_with_its_reason(folder: Path) -> None:
    rows = table_rows(render(read_search(folder)), "trials-table")
    by_number = {int(row[1]): row for row in rows}
    assert sorted(by_number) == list(range(24))
    assert by_number[6][2] == "failed" and by_number[6][-1].startswith("CUDA out of memory")
    stopped = [row for row in by_number.values() if row[2] == "stopped"]
    assert stopped and all("below" in row[-1] for row in stopped)
    states = [row[2] for row in rows]
    assert states == sorted(states, key=["completed", "stopped", "failed"].index)


def test_a_stopped_trial_takes_its_reason_from_the_rungs(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    without = [line | {"reason": None} if line["state"] == "stopped" else line for line in lines]
    (tmp_path / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in without))
    (tmp_path / "rungs.jsonl").write_text((folder / "rungs.jsonl").read_text())
    rows = table_rows(render(read_search(tmp_path)), "trials-table")
    assert all("the cutoff at" in row[-1] for row in rows if row[2] == "stopped")


def test_how_many_questions_a_capability_has(folder: Path) -> None:
    search = read_search(folder)
    expected = SIZES | {f"{name}/all of it": size for name, size in SIZES.items()}
    assert num_items(search, search.records) == expected
    first = search.records[0]
    first.metrics["mmstar_num_items"] += 1  # type: ignore[index]
    assert num_items(search, [first]) == {}, "they do not add up"


def test_importance_finds_the_key_that_decides(tmp_path: Path) -> None:
    search = read_search(make_results(tmp_path / "search", num_trials=120, confirms=False))
    milestone, values = compare_at_milestone(search)
    assert milestone in (1000, 3000)
    shares, _ = importances(search, values)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["lr_mp"] > 0.5 and shares["weight_decay"] < 0.2


def test_with_few_trials_importance_is_not_guessed(tmp_path: Path) -> None:
    search = read_search(
        make_results(tmp_path / "search", num_trials=FEWEST_TRIALS - 1, confirms=False)
    )
    chart = parameter_importance(search)
    assert not chart.variants and str(FEWEST_TRIALS) in chart.empty


def test_the_time_of_the_workers_adds_up(folder: Path) -> None:
    search = read_search(folder)
    done = works(search)
    assert len({work.group for work in done}) == NUM_GROUPS
    spent = spent_time(search)
    stages = [[w for w in done if w.record.confirms == confirms] for confirms in (False, True)]
    ends = {work.group: work.ended_at for work in done}
    idle = sum(
        max(w.ended_at for w in stage) - end
        for stage in stages
        for end in {w.group: w.ended_at for w in stage}.values()
    )
    starts = {work.group: work.free_at for work in reversed(done)}
    between = sum(ends[group] - starts[group] for group in ends)
    assert sum(spent.values()) == pytest.approx(between + idle, abs=1)
    assert spent["failed"] > 0 and spent["stopped"] > 0 and spent["confirming"] > 0


def test_an_interruption_is_no_waiting(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    night = 8 * 3600
    for line in lines:
        if line["number"] >= 12:
            for times in (line, *line["legs"]):
                for field in {"submitted_at", "first_step_at", "ended_at"} & times.keys():
                    times[field] = times[field] and times[field] + night
    (tmp_path / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    spent = spent_time(read_search(tmp_path))
    assert spent["waiting"] < 600, "eight hours were cut out"
    assert max(line["ended_at"] for line in lines) > BEGIN + night


def test_nothing_of_a_folder_is_markup(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "a<b>&", failure=HOSTILE, ended_by=f"because {HOSTILE}")
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "a<b>" not in text
    assert text.count("</script>") == 4, "of the theme, the data, plotly and the page's script"
    hover = page_data(text)["hover"]["trial-0006"]
    assert "&lt;/script&gt;" in hover and "<script" not in hover


def test_json_in_a_page_ends_no_element_and_has_no_nan(folder: Path) -> None:
    search = read_search(folder)
    first = next(record for record in search.records if record.number == 0)
    others = [record for record in search.records if record.number]
    first.reports[-1].metrics["val_loss"] = float("nan")
    changed = dataclasses.replace(first, parameters={"lr_mp": HOSTILE})
    text = render(dataclasses.replace(search, records=[changed, *others]))
    (data,) = re.findall(r'id="report-data">(.*?)</script>', text, re.S)
    assert not set("<>&") & set(data)
    curves = next(c for c in page_data(text)["charts"] if c["name"] == "learning-curves")
    losses = next(v for v in curves["variants"] if v["label"] == "val_loss")["traces"]
    assert "NaN" not in data
    (default,) = (trace["y"] for trace in losses if trace["name"].startswith("default"))
    assert default[2:] == [None, None], "the last value, and the gap after the curve"
    assert html.escape(HOSTILE, quote=False) in page_data(text)["hover"][first.trial_id]
    assert rounded({"a": (1.23456789, float("inf")), "b": 7}) == {"a": [1.23457, None], "b": 7}


def test_a_search_that_has_only_begun(folder: Path, tmp_path: Path) -> None:
    for name in ("space.yaml", "data.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No trial has reported yet." in text and "No trial has ended yet." in text
    assert "Running" in text


def test_a_single_run_has_no_search_in_its_report(tmp_path: Path) -> None:
    path = write_report(make_single(tmp_path / "single"))
    text = path.read_text(encoding="utf-8")
    assert "A single run." in text and "Gain over the default" not in text
    (curves,) = (c for c in page_data(text)["charts"] if c["name"] == "learning-curves")
    assert any(FULL in trace["x"] for trace in curves["variants"][0]["traces"])


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("trials.jsonl", 0.7, r"trials\.jsonl: has \d+ trials, but summary\.json counts 24"),
        ("confirm.jsonl", 0.7, r"confirm\.jsonl: has 2 trials, but summary\.json counts 4"),
        ("rungs.jsonl", 0.7, r"rungs\.jsonl: lacks \d+ lines on trials"),
        ("summary.json", 0.5, r"summary\.json: is damaged: invalid JSON"),
        ("summary.json", None, r"summary\.json: is not there"),
        ("trials.jsonl", None, r"trials\.jsonl is not there"),
        ("space.yaml", 0.5, r"space\.yaml: .*; put back a copy"),
        ("space.yaml", None, r"space\.yaml: is not there; what was searched"),
        ("data.json", 0.5, r"data\.json: is damaged"),
        ("answers/confirm-0-seed-1.jsonl", None, r"answers lacks confirm-0-seed-1"),
        ("answers/confirm-0-seed-1.jsonl", 0.5, r"line \d+: is not an answer"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, name: str, share: float | None, message: str
) -> None:
    folder = make_results(tmp_path / "search")
    path = folder / name
    if share is None:
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text[: int(share * len(text))])
    assert any(re.search(message, said) for said in read_search(folder).missing)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Not all of this folder could be read" in text


def test_a_single_run_lacks_nothing_of_a_search(tmp_path: Path) -> None:
    missing = read_search(make_single(tmp_path / "single")).missing
    assert not [said for said in missing if "rungs.jsonl" in said or "space.yaml" in said]


def test_lost_confirming_runs_leave_what_the_summary_says(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "search")
    (folder / "confirm.jsonl").unlink()
    search = read_search(folder)
    assert search.best is not None and not search.best.confirms
    assert search.confirmation is not None and len(search.confirmation["configurations"]) == 2
    write_report(folder)


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_search(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing of a search")
    with pytest.raises(UserError, match=r"holds no results of a search: none of trials\.jsonl"):
        read_search(tmp_path)


def run_report(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nanovlm", "report", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_program(folder: Path, tmp_path: Path) -> None:
    done = run_report(str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size < 15e6
    wrong = run_report(str(tmp_path / "nowhere"))
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


def test_the_environment_is_written_and_shown(folder: Path, tmp_path: Path) -> None:
    found = describe_environment()
    assert set(found["packages"]) == set(PACKAGES) and found["packages"]["optuna"]
    assert found["cpus"] >= 1 and re.fullmatch("[0-9a-f]{40}", found["git_commit"])
    (tmp_path / "trials.jsonl").write_text((folder / "trials.jsonl").read_text())
    (tmp_path / ENVIRONMENT_FILE).write_text(json.dumps(found | {"gpus": ["Some <GPU>"]}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert found["git_commit"] in text and "Some &lt;GPU&gt;" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.26, "0.3 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (392, "6 min 32 s"),
        (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (360_000, "4 d 4 h"), (None, "–"),  # noqa: RUF001
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
