"""The states of trials and worker groups, driven through thousands of random histories."""

import random
from dataclasses import dataclass, field

import pytest

from nanovlm.config import TrainConfig
from nanovlm.distributed.broker import (
    FIRST_STALL_SECONDS,
    LEAST_STALL_SECONDS,
    MAX_STARTS,
    STALL_FACTOR,
    Broker,
)
from nanovlm.messages import Assignment, Decision, End, Job, Notice, Pulse, Report, TrialRecord
from tests.records import make_pulse

ENDS = (10, 20, 30)
"""Samples seen at the reports of a trial."""
CONFIG = TrainConfig()


def job(number: int) -> Job:
    return Job(trial_id=f"trial-{number}", number=number, config=CONFIG)


def report(index: int, value: float = 0.5) -> Report:
    return Report(
        samples_seen=ENDS[index],
        step=index,
        metrics={"mmstar_accuracy": value},
        seconds=1.0,
        is_final=index == len(ENDS) - 1,
    )


def pulse(number: int) -> Pulse:
    return make_pulse(f"trial-{number}", 1)


def take(broker: Broker, group: str, now: float = 0.0) -> Assignment:
    given = broker.next_job(group, now)
    assert given is not None, f"{group} gets a job"
    return given


def texts(broker: Broker) -> list[str]:
    return [event.text for event in broker.take_events() if isinstance(event, Notice)]


def records(broker: Broker) -> list[TrialRecord]:
    return [event for event in broker.take_events() if isinstance(event, TrialRecord)]


# ---------------------------------------------------------------------- random histories


@dataclass
class Group:
    """A worker group as it behaves: it does what the broker says, and what it remembers may be out
    of date."""

    name: str
    given: Assignment | None = None
    index: int = 0
    """Of the report that it makes next, or waits for the decision on."""
    waits: bool = False


@dataclass
class World:
    """A search, its groups, and whoever follows; each step is one event."""

    random: random.Random
    broker: Broker = field(default_factory=Broker)
    groups: list[Group] = field(default_factory=list)
    ghosts: list[Group] = field(default_factory=list)
    """Groups that were taken for dead and are not."""
    states: dict[str, int] = field(default_factory=dict)
    """By trial: reports whose state is on the disk."""
    deaths: dict[str, int] = field(default_factory=dict)
    """By trial: lost groups since its last new report."""
    heard: dict[str, int] = field(default_factory=dict)
    """By trial: reports that the search has heard of and decided on."""
    told: dict[str, list[TrialRecord]] = field(default_factory=dict)
    now: float = 0.0
    num_groups: int = 0

    def submit(self) -> None:
        number = len(self.told)
        self.told[f"trial-{number}"] = []
        self.broker.submit(job(number), 0.0)

    def submit_again(self) -> None:
        """The actor that had asked was lost."""
        if self.told:
            number = self.random.randrange(len(self.told))
            self.broker.submit(job(number), 0.0)
            self.heard[f"trial-{number}"] = 0

    def add_group(self) -> None:
        self.groups.append(Group(f"group-{self.num_groups}"))
        self.num_groups += 1

    def work(self) -> None:
        everyone = self.groups + self.ghosts
        if everyone:
            self.work_in(self.random.choice(everyone))

    def work_in(self, group: Group) -> None:
        """Let a group do its next thing."""
        given = group.given
        if given is None:
            self.ask_for_job(group)
        elif group.waits:
            decision = self.broker.decision(given.lease, ENDS[group.index], self.now)
            if decision is Decision.STOP:
                self.ask_for_job(group)
            elif decision is Decision.CONTINUE:
                group.index, group.waits = group.index + 1, False
        elif self.random.random() < 0.05:
            self.broker.fail(given.lease, End.ERROR, "a fault", 1.0)
            self.ask_for_job(group)
        else:
            name, before = given.job.trial_id, self.record(given.job.trial_id).reports
            self.states[name] = max(self.states.get(name, 0), group.index + 1)
            self.broker.report(given.lease, report(group.index), 1.0, 2.0, self.now)
            if len(self.record(name).reports) > len(before):
                self.deaths[name] = 0
            group.waits = True

    def ask_for_job(self, group: Group) -> None:
        group.given, group.index, group.waits = self.broker.next_job(group.name, self.now), 0, False

    def restart(self) -> None:
        """The workers of a group die, and Ray Train starts them again."""
        if self.groups:
            group = self.random.choice(self.groups)
            self.count_death(group)
            self.ask_for_job(group)

    def lose(self) -> None:
        if self.groups:
            group = self.groups.pop(self.random.randrange(len(self.groups)))
            self.count_death(group)
            self.broker.lose(group.name, "its controller has ended")
            if self.random.random() < 0.5:
                self.ghosts.append(group)

    def stall(self) -> None:
        """All groups at work are silent for too long."""
        self.now += self.broker.stall_seconds() + 1
        held = [group for group in self.groups if group.given and self.holds(group)]
        for name in self.broker.lose_stalled(self.now):
            (group,) = [group for group in held if group.name == name]
            assert group.given is not None
            trial = group.given.job.trial_id
            self.deaths[trial] = self.deaths.get(trial, 0) + 1
            self.groups.remove(group)
            self.ghosts.append(group)

    def count_death(self, group: Group) -> None:
        if group.given is not None and self.holds(group):
            name = group.given.job.trial_id
            self.deaths[name] = self.deaths.get(name, 0) + 1

    def holds(self, group: Group) -> bool:
        assert group.given is not None
        return self.broker._leases.get(group.given.lease) == group.name

    def search(self) -> None:
        """The search hears of a report and decides."""
        names = [name for name, told in self.told.items() if told and not self.is_over(name)]
        if not names:
            return
        name = self.random.choice(names)
        index = self.heard.get(name, 0)
        answer = self.broker.answer(name, index)
        if isinstance(answer, Report):
            assert answer in self.told[name][-1].reports, "it is in the results folder"
            self.heard[name] = index + 1
            stops = self.random.random() < 0.3 and not answer.is_final
            decision = Decision.STOP if stops else Decision.CONTINUE
            self.broker.decide(name, answer.samples_seen, decision, "below the cutoff")

    def follow(self) -> None:
        """Whoever keeps the results folder takes in what has happened."""
        for event in self.broker.take_events():
            if isinstance(event, TrialRecord):
                before = self.told[event.trial_id]
                assert not before or before[-1].end is None, "nothing comes after the end"
                assert not before or len(event.reports) >= len(before[-1].reports)
                before.append(event)

    def record(self, name: str) -> TrialRecord:
        return self.broker._trials[name].record

    def is_over(self, name: str) -> bool:
        return bool(self.told[name]) and self.told[name][-1].end is not None

    def check(self) -> None:
        """What holds at any time."""
        queued = [trial.job.trial_id for trial in self.broker._queue]
        served = [trial.job.trial_id for trial in self.broker._serving.values()]
        is_open = [name for name in self.told if self.record(name).end is None]
        assert sorted(queued + served) == sorted(is_open), "each at one place, none lost"
        holders = [group for group in self.groups + self.ghosts if group.given]
        leases = [group.given.lease for group in holders if group.given and self.holds(group)]
        assert len(leases) == len(set(leases)) == len(served), "one group works on each"
        for name in self.told:
            seen = [r.samples_seen for r in self.record(name).reports]
            assert seen == list(ENDS[: len(seen)]), "each report once, in order"
            if self.record(name).end is End.WORKERS_DIED:
                assert self.deaths[name] >= MAX_STARTS

    def settle(self) -> None:
        """Nothing goes wrong any more: all trials end."""
        self.add_group()
        for _ in range(60 * len(self.told) + 60):
            for group in self.groups + self.ghosts:
                self.work_in(group)
            self.follow()
            for _ in range(4 * len(self.told)):
                self.search()
            if all(map(self.is_over, self.told)):
                break
        self.check()
        assert [name for name in self.told if not self.is_over(name)] == []
        assert self.broker.is_idle


EVENTS = (
    World.submit, World.submit_again, World.add_group, World.lose, World.restart, World.stall,
    *[World.work] * 12, *[World.search] * 6, *[World.follow] * 6,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_no_trial_is_lost_or_runs_twice_or_waits_for_ever(seed: int) -> None:
    for history in range(100):
        world = World(random.Random(f"{seed} {history}"))
        for _ in range(world.random.choice((20, 60, 150))):
            world.random.choice(EVENTS)(world)
            world.check()
        world.settle()


@pytest.mark.parametrize("reason", [None, "the target is reached"])
def test_after_the_close_everyone_gets_an_answer(reason: str | None) -> None:
    for history in range(200):
        world = World(random.Random(f"{reason} {history}"))
        for _ in range(60):
            world.random.choice(EVENTS)(world)
        world.broker.close(reason)
        for _ in range(3):
            for group in world.groups + world.ghosts:
                world.work_in(group)
        for group in world.groups + world.ghosts:
            assert world.broker.next_job(group.name, 0.0) is None
        world.follow()
        world.follow()
        assert world.broker.is_idle
        for name in world.told:
            assert world.broker.answer(name, len(ENDS)) is not None
            record = world.record(name)
            if record.end is None:
                assert reason is None or not record.reports, "what has a report is not thrown away"


# ---------------------------------------------------------------------- single rules


def test_a_lost_group_s_trial_goes_on_elsewhere_and_its_lease_has_ended() -> None:
    broker = Broker()
    broker.submit(job(0), 0.0)
    first = take(broker, "group-0")
    broker.report(first.lease, report(0), 1.0, 2.0, 1.0)
    broker.decide("trial-0", 10, Decision.CONTINUE)
    broker.take_events()
    broker.lose("group-0", "its controller has ended (killed)")
    assert texts(broker) == [
        "group-0: its controller has ended (killed); trial-0 goes on from its last report in a "
        "free group"
    ]
    second = take(broker, "group-1")
    assert second.job == first.job
    broker.report(first.lease, report(1), 1.0, 3.0, 2.0)  # the group was alive after all
    broker.fail(first.lease, End.ERROR, "too late", 3.0)
    broker.pulse(first.lease, pulse(0), 3.0)
    assert broker.decision(first.lease, 20, 3.0) is Decision.STOP
    assert broker.next_job("group-0", 3.0) is None and broker.is_lost("group-0")
    broker.report(second.lease, report(0), 5.0, 6.0, 4.0)  # made again from the state
    assert broker.decision(second.lease, 10, 4.0) is Decision.CONTINUE
    broker.report(second.lease, report(1), 5.0, 7.0, 5.0)
    *_, last = records(broker)
    assert (last.worker_group, last.samples_seen, last.first_step_at) == ("group-1", 20, 1.0)


def test_a_trial_that_kills_its_workers_is_given_up_unless_it_comes_further() -> None:
    broker = Broker()
    broker.submit(job(0), 0.0)
    for index in range(2):
        for _ in range(MAX_STARTS - 1 - index):  # the group of the report before counts too
            take(broker, "group-0")
        broker.report(take(broker, "group-0").lease, report(index), 1.0, 2.0, 1.0)
        broker.decide("trial-0", ENDS[index], Decision.CONTINUE)
    for _ in range(MAX_STARTS - 1):
        take(broker, "group-0")
    assert broker.next_job("group-0", 0.0) is None
    *_, last = records(broker)
    assert last.end is End.WORKERS_DIED and last.is_infeasible
    assert last.reason == (
        "its workers died 3 times without coming further; last group-0: a worker has ended"
    )


def test_silence_is_measured_where_a_group_is_at_work() -> None:
    broker = Broker()
    broker.submit(job(0), 0.0)
    assert broker.stall_seconds() == FIRST_STALL_SECONDS
    lease = take(broker, "group-0", now=100.0).lease
    broker.pulse(lease, pulse(0), 190.0)
    broker.report(lease, report(0), 1.0, 2.0, now=200.0)
    assert broker.stall_seconds() == STALL_FACTOR * 90.0
    waited = 200.0 + 10 * FIRST_STALL_SECONDS
    assert broker.lose_stalled(waited) == []  # it waits for the search, which may take its time
    broker.decide("trial-0", 10, Decision.CONTINUE)
    assert broker.decision(lease, 10, waited) is Decision.CONTINUE
    assert broker.lose_stalled(waited + 900.0) == []
    assert broker.lose_stalled(waited + 901.0) == ["group-0"]
    assert texts(broker) == [
        "group-0: no sign of life for 15 minutes; trial-0 goes on from its last report in a free "
        "group"
    ]


def test_the_least_silence_and_a_given_one() -> None:
    broker, given = Broker(), Broker(stall_seconds=7.0)
    for one in (broker, given):
        one.submit(job(0), 0.0)
        one.report(take(one, "group-0").lease, report(0), 1.0, 2.0, now=1.0)
    assert broker.stall_seconds() == LEAST_STALL_SECONDS
    assert given.stall_seconds() == 7.0


def test_a_trial_that_the_search_gives_up_has_failed() -> None:
    broker = Broker()
    for number in range(2):
        broker.submit(job(number), 0.0)
    lease = take(broker, "group-0").lease
    broker.give_up("its actor was lost")
    assert broker.decision(lease, 10, 0.0) is Decision.STOP
    ended = [record for record in records(broker) if record.end is not None]
    assert [(record.number, record.end, record.reason) for record in ended] == [
        (0, End.ERROR, "its actor was lost"),
        (1, End.ERROR, "its actor was lost"),
    ]
    assert broker.next_job("group-0", 0.0) is None


def test_a_metric_that_is_not_finite_ends_the_trial() -> None:
    broker = Broker()
    broker.submit(job(0), 0.0)
    lease = take(broker, "group-0").lease
    broker.report(lease, report(0, float("nan")), 1.0, 2.0, 1.0)
    *_, last = records(broker)
    assert (last.end, last.reports) == (End.NOT_FINITE, ())
    assert last.reason == "mmstar_accuracy is nan after 10 samples"


def test_a_run_that_cannot_go_on_ends_no_trial() -> None:
    """Such as on a full disk: it is no failure of the trial's, whatever ranks say afterwards."""
    broker = Broker()
    for number in range(3):
        broker.submit(job(number), at=0.0)
    first, second = take(broker, "a"), take(broker, "b")
    broker.report(second.lease, report(0), 0.5, 1.0, now=1.0)
    broker.take_events()
    broker.abort("trial-0: no space left")
    broker.abort("trial-1: no space left")
    broker.fail(first.lease, End.ERROR, "rank 1 has lost rank 0", at=2.0)
    assert broker.next_job("a", now=3.0) is broker.next_job("b", now=3.0) is None
    assert broker.take_events() == [Notice(text="trial-0: no space left", ends_run=True)]
    assert broker.is_closed and broker.is_idle
