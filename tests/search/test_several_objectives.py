"""A search after several objectives: its space file, its rungs, and what its samplers learn."""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from benchmarks.replay_clock import Trace, simulate
from benchmarks.replay_search import our_search
from nanovlm.config.parameter import Parameter
from nanovlm.config.search_settings import Objective, Scheduler, join
from nanovlm.config.space import SearchSpace, load_space
from nanovlm.errors import UserError
from nanovlm.messages import TrialState
from nanovlm.pruning.pausing_halving import PausingHalving, build_rungs
from nanovlm.pruning.successive_halving import StoppingHalving
from nanovlm.results.decisions import PruningDecision
from nanovlm.results.pareto import Ranking, front_ranks, hypervolume
from nanovlm.results.read import RUNGS_FILE
from nanovlm.samplers.history import CURVE, OTHERS, SOURCE, Scalarized
from nanovlm.search.resume import mend_search
from nanovlm.search.study import open_study
from tests.records import make_record, make_report, make_speed

SECONDS = "seconds_per_sample"
BOTH = join([Objective(), Objective.model_validate({"metric": SECONDS})])
MILESTONES = (100, 300)


def space_of(folder: Path, objective: str, **overrides: Any) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(f"preset: digits\nsearch: {{lr_mp: default}}\nobjective: {objective}\n")
    return load_space(path, overrides)


# ---------------------------------------------------------------------- the space file


def test_one_mapping_and_a_list_of_one_are_the_same(tmp_path: Path) -> None:
    texts = ["{metric: val_loss, mode: min}", "[{metric: val_loss, mode: min}]",
             "[{metric: val_loss}]"]  # fmt: skip
    one, listed, short = (space_of(tmp_path, text) for text in texts)
    assert one == listed == short and one.to_yaml() == listed.to_yaml()
    assert "objective:\n  metric: val_loss\n  mode: min\n" in one.to_yaml()


def test_a_list_is_kept_as_it_is(tmp_path: Path) -> None:
    space = space_of(tmp_path, f"[{{metric: mmstar_accuracy}}, {{metric: {SECONDS}, at_most: 1}}]")
    assert [each.metric for each in space.objective.all] == ["mmstar_accuracy", SECONDS]
    assert space.objective.all[1].bound == 1
    (tmp_path / "again.yaml").write_text(space.to_yaml())
    again = load_space(tmp_path / "again.yaml")
    assert again.objective == space.objective and again.differences(space) == []
    unbound = space_of(tmp_path, f"[{{metric: mmstar_accuracy}}, {{metric: {SECONDS}}}]")
    assert unbound.objective != space.objective
    assert unbound.differences(space) == [], "a bound only chooses, so it may change"
    open_study(space, tmp_path)
    open_study(unbound, tmp_path)
    alone = space_of(tmp_path, "{metric: mmstar_accuracy}")
    assert alone.differences(space) == ["objective"]
    with pytest.raises(UserError, match=r"is the study of another space.*objective"):
        open_study(alone, tmp_path)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("[]", "objective: must be one objective or a list of at most 3, got []"),
        ("[{metric: a}, {metric: b}, {metric: c}, {metric: d}]",
         "objective: must be one objective or a list of at most 3, got "),
        ("[{metric: a}, {metric: a}]", "objective: a stands there twice, got "),
        ("[{metric: a}, 3]", "objective[1]: must be a valid dictionary"),
        ("[{metric: a}, {metrc: b}]", "unknown key 'objective[1].metrc'. Did you mean 'metric'?"),
        ("{metrc: b}", "unknown key 'objective.metrc'. Did you mean 'metric'?"),
        ("[{metric: a}, {metric: b, mode: up}]",
         "objective[1].mode: must be 'max' or 'min', got 'up'"),
        ("[{metric: seconds_per_sample}, {metric: a}]", "the first one must say how good a model"),
        ("[{metric: mmstar_accuracy, at_least: 0.9}, {metric: val_loss}]",
         "objective: the best by the first objective is taken, so a bound of mmstar_accuracy"),
        ("[{metric: mmstar_accuracy}, {metric: val_loss, at_least: 0.9}]",
         "objective[1].at_least: must be at_most for val_loss, of which less is better, got 0.9"),
        ("[{metric: mmstar_accuracy}, {metric: peak_memory_gib}]",
         "objective[1].metric: peak_memory_gib on the CPU is that of the whole process"),
    ],
)  # fmt: skip
def test_objectives_that_contradict(tmp_path: Path, objective: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        space_of(tmp_path, objective)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sampler.name": "cmaes", "scheduler.type": "stopping"}, "cmaes follows a single obj"),
        ({"scheduler.name": "pasha"}, "pasha goes by the gaps between values of a single"),
        ({"objective.mode": "max"}, "objective.mode: objective is not a mapping in which it could"),
    ],
)
def test_what_goes_with_one_objective_alone(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        space_of(tmp_path, f"[{{metric: mmstar_accuracy}}, {{metric: {SECONDS}}}]", **setting)


# ---------------------------------------------------------------------- the rungs


@pytest.mark.parametrize("seed", range(5))
def test_an_objective_that_is_always_the_same_orders_nothing(seed: int) -> None:
    """The order is that of the other one, however trials come and go."""
    draw = random.Random(seed)
    one, both = Ranking(Objective()), Ranking(BOTH)
    known = list[int]()
    for number in range(60):
        if known and draw.random() < 0.3:
            gone = known.pop(draw.randrange(len(known)))
            one.remove(gone)
            both.remove(gone)
        value = round(draw.random(), 1)
        one.add(number, [value])
        both.add(number, [value, 0.002 * draw.uniform(0.999, 1.001)])
        known.append(number)
        assert one.numbers() == both.numbers() and len(one) == len(both)
        assert [one.index(n) for n in known] == [both.index(n) for n in known]
        some = [Ranking(Objective()), Ranking(BOTH)]
        for member in draw.sample(known, len(known) // 2):
            some[0].add(member, one._values[member])
            some[1].add(member, both._values[member])
        first, last = sorted((draw.randrange(70), draw.randrange(70)))
        for limits in ((), (first,), (0, last), (first, last)):
            wanted = [n for n in one.numbers(*limits) if n in some[0]]
            assert one.among(some[0], *limits) == both.among(some[1], *limits) == wanted


def decide(rungs: PausingHalving, number: int, *values: float) -> PruningDecision:
    return rungs.decide(number, 103, *values)


def test_trials_go_on_that_are_worth_having(tmp_path: Path) -> None:
    log = tmp_path / RUNGS_FILE
    rungs = PausingHalving(Scheduler(), MILESTONES, objective=BOTH, log=log)
    values = [(0.9, 0.010), (0.5, 0.001), (0.4, 0.011), (0.3, 0.002), (0.2, 0.020), (0.85, 0.030)]
    verdicts = [decide(rungs, number, *row) for number, row in enumerate(values)]
    assert verdicts[2].reason.startswith(
        "mmstar_accuracy 0.4, seconds_per_sample 0.011 is number 3 of 3 trials at 100 samples"
    )
    assert verdicts[2].cutoff is None and verdicts[2].others == (0.011,)
    gone_on = [verdict.number for verdict in verdicts if verdict.goes_on]
    while (promoted := rungs.promote()) is not None:
        gone_on.append(promoted.number)
    assert sorted(gone_on) == [0, 1], "the best third: both ends of the front"
    again = PausingHalving(Scheduler(), MILESTONES, objective=BOTH, log=log)
    assert again.paused == rungs.paused and again._decisions == rungs._decisions
    again.withdraw(0)
    last = again.promote(is_last=True)
    assert last is not None and last.number == 5, "the best accuracy that is left"


def test_of_trials_that_stop_the_best_third_goes_on() -> None:
    rungs = StoppingHalving(Scheduler(type="stopping"), MILESTONES, objective=BOTH)
    values = [(0.5, 0.01), (0.9, 0.01), (0.4, 0.02), (0.3, 0.001), (0.45, 0.03), (0.95, 0.009)]
    verdicts = [rungs.decide(number, 100, *row) for number, row in enumerate(values)]
    assert [verdict.goes_on for verdict in verdicts] == [True, True, False, True, False, True]
    assert "is number 5 of 5 trials at 100 samples, of which the best 2" in verdicts[4].reason


def test_with_one_objective_the_log_does_not_speak_of_others(tmp_path: Path) -> None:
    log = tmp_path / RUNGS_FILE
    decide(PausingHalving(Scheduler(), MILESTONES, objective=Objective(), log=log), 0, 0.5)
    assert "others" not in log.read_text()


# ---------------------------------------------------------------------- what samplers see

X: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}


def told(number: int, reports: Mapping[int, tuple[float, float]], is_full: bool) -> FrozenTrial:
    last = reports[max(reports)][0] if reports else None
    others: dict[str, Any] = {str(step): [row[1]] for step, row in reports.items()}
    made = optuna.trial.create_trial(
        state=OptunaState.COMPLETE if is_full else OptunaState.RUNNING,
        value=last if is_full else None,
        params={"x": 0.5},
        distributions=X,
        intermediate_values={step: row[0] for step, row in reports.items()},
        user_attrs={OTHERS: others},
    )
    made.number = number
    return made


def shown_to(seed: int, trials: list[FrozenTrial], objective: Objective = BOTH) -> list[float]:
    return [t.intermediate_values[100] for t in Scalarized(objective, seed, None)(trials)]


def test_what_is_better_in_all_is_better_in_every_weighting() -> None:
    draw = np.random.default_rng(0)
    rows = list(zip(draw.random(30).tolist(), draw.lognormal(size=30).tolist(), strict=True))
    trials = [told(number, {100: row}, is_full=False) for number, row in enumerate(rows)]
    bests = set[int]()
    for seed in range(40):
        values = shown_to(seed, trials)
        assert values == shown_to(seed, trials), "a weighting is the same again"
        bests.add(int(np.argmax(values)))
        for i, (accuracy, seconds) in enumerate(rows):
            for j, (other, others) in enumerate(rows):
                if accuracy > other and seconds < others / 1.1:
                    assert values[i] > values[j]
    losses = np.array([[-a, Objective(metric=SECONDS).loss(s)] for a, s in rows])
    front = {int(place) for place in np.flatnonzero(front_ranks(losses) == 0)}
    assert bests <= front and len(bests) >= 3, "over the weightings the front is covered"


def test_an_objective_that_is_always_the_same_changes_no_order() -> None:
    values = [0.3, 0.9, 0.1, 0.5]
    trials = [told(n, {100: (value, 0.01)}, is_full=False) for n, value in enumerate(values)]
    for seed in range(5):
        assert np.argsort(shown_to(seed, trials)).tolist() == np.argsort(values).tolist()
    less = join([Objective.model_validate({"metric": "val_loss"}), BOTH.all[1]])
    for seed in range(5):
        assert np.argsort(shown_to(seed, trials, less)).tolist() == np.argsort(values).tolist()


def test_trials_keep_their_states_and_full_ones_have_a_level_of_their_own() -> None:
    trials = [
        told(0, {100: (0.5, 0.01), 903: (0.8, 0.01)}, is_full=True),
        told(1, {100: (0.4, 0.02), 912: (0.9, 0.02)}, is_full=True),
        told(2, {100: (0.3, 0.03)}, is_full=False),
        told(3, {}, is_full=False),
    ]
    trials[2].user_attrs[OTHERS]["300"] = [0.03]  # written before a kill, and the value was not
    trials[2].intermediate_values[400] = 0.7
    shown = Scalarized(BOTH, 3, None)(trials)
    assert [t.state for t in shown] == [t.state for t in trials]
    assert [sorted(t.intermediate_values) for t in shown] == [[100, 903], [100, 912], [100], []]
    assert shown[0].value == shown[0].intermediate_values[903] != trials[0].value
    compared = [trial.value is not None and trial.value < 0 for trial in shown[:2]]
    assert compared == [True, True], "with each other"
    assert shown[2].value is None
    assert trials[0].value == 0.8, "the study is as it was"


def test_an_earlier_search_of_another_length_has_levels_of_its_own() -> None:
    """Its values are made one as well, and are compared with each other alone."""
    ours = [told(0, {100: (0.5, 0.01)}, is_full=False), told(1, {100: (0.7, 0.02)}, is_full=False)]
    earlier = [told(2, {100: (0.8, 1.0)}, is_full=False), told(3, {100: (0.9, 9.0)}, is_full=False)]
    for trial, (accuracy, seconds) in zip(earlier, [(0.8, 1.0), (0.9, 9.0)], strict=True):
        curve = [(0.3, accuracy, seconds), (1.0, accuracy + 0.1, seconds)]
        trial.user_attrs |= {SOURCE: "older", CURVE: curve}
    shown = Scalarized(BOTH, 3, None)([*ours, *earlier])
    alone = Scalarized(BOTH, 3, None)(ours)
    for ours_only, together in zip(alone, shown, strict=False):
        assert ours_only.intermediate_values == together.intermediate_values
    curves = [trial.user_attrs[CURVE] for trial in shown[2:]]
    assert [[share for share, _ in curve] for curve in curves] == [[0.3, 1.0]] * 2
    for place in (0, 1):  # both trade-offs are the same, so as good as ours are to each other
        expected = [trial.intermediate_values[100] for trial in alone]
        assert [curve[place][1] for curve in curves] == pytest.approx(expected)
    assert len(earlier[0].user_attrs[CURVE][0]) == 3, "the study is as it was"


# ---------------------------------------------------------------------- whole searches


class Curves:
    """Of three keys: `a` makes a model better and dearer, the others are best somewhere inside.

    So the front are all `a` with `b` = 0.5 and `c` = 0.3.
    """

    budget, last = 2700, 2
    parameters = tuple(
        Parameter(key=key, kind="uniform", values=(0.0, 1.0), when={}) for key in "abc"
    )

    def __init__(self) -> None:
        self.rows = list[tuple[float, float, float]]()

    def row_of(self, values: Mapping[str, Any]) -> int:
        self.rows.append((values["a"], values["b"], values["c"]))
        return len(self.rows) - 1

    def row_at(self, point: np.ndarray) -> int:
        return self.row_of(dict(zip("abc", point, strict=True)))

    def samples(self, row: int, column: int) -> int:
        return (300, 900, 2700)[column]

    def value(self, row: int, column: int) -> float:
        a, b, c = self.rows[row]
        return math.sqrt(a) * (0.8 + 0.1 * column) - abs(b - 0.5) - abs(c - 0.3)

    def others(self, row: int, column: int) -> tuple[float]:
        return (0.001 * 30 ** self.rows[row][0],)

    def column(self, row: int, milestone: int) -> int:
        return (300, 900, 2700).index(milestone)

    def column_of_share(self, share: float) -> int:
        raise NotImplementedError

    def volume(self, trace: Trace) -> float:
        """Return the hypervolume of the trials of full length, 1 if there were all of them."""
        full = [r.row for r in trace.reports if r.column == self.last]
        losses = [[-self.value(row, 2), self.rows[row][0]] for row in full]
        return hypervolume(np.array(losses).reshape(-1, 2), np.array([0.0, 1.0])) * 3 / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeKeys(SearchSpace):
    def default_values(self) -> dict[str, Any]:
        return {"a": 0.5, "b": 0.1, "c": 0.5}


Search = Callable[..., tuple[Curves, Trace, Path]]


@pytest.fixture
def search(tmp_path: Path) -> Search:
    def run(name: str, trainings: int, **overrides: Any) -> tuple[Curves, Trace, Path]:
        both = f"[{{metric: mmstar_accuracy}}, {{metric: {SECONDS}}}]"
        slots = overrides.pop("slots", 2)
        given = space_of(tmp_path, both, **overrides)
        fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        space = ThreeKeys(**{**fields, "parameters": Curves.parameters, "name": name})
        (tmp_path / name).mkdir()
        curves = Curves()
        loop = our_search(curves, space, slots, tmp_path / name)
        return curves, simulate(curves, loop, slots, trainings * Curves.budget), tmp_path / name

    return run


def test_a_search_learns_both_objectives(search: Search) -> None:
    """Of the front's hypervolume it finds far more than random trials with the same rungs."""

    def volume(sampler: str, seed: int) -> float:
        settings = {"sampler.name": sampler, "sampler.seed": seed}
        curves, trace, _ = search(f"{sampler}-{seed}", 12, **settings)
        return curves.volume(trace)

    learnt, drawn = ([volume(name, seed) for seed in range(3)] for name in ("auto", "random"))
    assert np.mean(learnt) > np.mean(drawn) + 0.1, (learnt, drawn)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler.name": "tpe"},
        {"sampler.name": "gp"},
        {"sampler.name": "qmc"},
        {"scheduler.type": "stopping"},
        {"scheduler.name": "hyperband"},
        {"scheduler.name": "none"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_each_sampler_and_scheduler_searches(search: Search, settings: dict[str, Any]) -> None:
    curves, trace, folder = search("one", 8, slots=3, **settings)
    assert trace.num_full >= 3 and 0.1 < curves.volume(trace) <= 1
    study = optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
        ),
    )
    assert not any("sampler_failure" in trial.user_attrs for trial in study.trials)
    for trial in study.trials:
        steps = {int(step) for step in trial.user_attrs.get(OTHERS, {})}
        assert steps == set(trial.intermediate_values)


def test_lost_verdicts_are_made_up_for_with_all_values(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        f"[{{metric: mmstar_accuracy}}, {{metric: {SECONDS}}}]",
        **{"scheduler.type": "stopping", "sampler.name": "random"},
    )
    rungs = build_rungs(space, MILESTONES, tmp_path / RUNGS_FILE)
    records = []
    for number, (accuracy, seconds) in enumerate([(0.5, 0.01), (0.6, 0.005), (0.4, 0.02)]):
        speed = make_speed(samples_per_second=1 / seconds)
        verdict = rungs.decide(number, 104, accuracy, 1 / speed.samples_per_second)
        reports = [make_report(104, {"mmstar_accuracy": accuracy}, speed=speed)]
        if verdict.goes_on:
            reports.append(make_report(900, {"mmstar_accuracy": 0.9}, speed=speed, is_final=True))
        state: TrialState = "completed" if verdict.goes_on else "stopped"
        parameters = {"lr_mp": 0.001 * (number + 1)}
        records.append(make_record(number, state, reports=reports, parameters=parameters))
    (tmp_path / RUNGS_FILE).unlink()
    mend_search(space, tmp_path, (100,), records)
    again = build_rungs(space, MILESTONES, tmp_path / RUNGS_FILE)
    assert isinstance(rungs, StoppingHalving) and isinstance(again, StoppingHalving)
    assert again._rungs == rungs._rungs
    (tried,) = (v for v in again._decisions.values() if v.number == 2)
    assert tried.others == pytest.approx((0.02,)) and not tried.goes_on
