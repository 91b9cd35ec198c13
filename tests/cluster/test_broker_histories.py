"""The states of trials and worker groups, driven through thousands of random histories."""

import random
from dataclasses import dataclass, field

import pytest

from nanovlm.cluster.broker_state import MAX_STARTS, BrokerState
from nanovlm.messages import Assignment, Decision, End, TrialRecord
from tests.cluster.short_trials import ENDS, job, report
from tests.records import make_record


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
    state: BrokerState = field(default_factory=BrokerState)
    groups: list[Group] = field(default_factory=list)
    ghosts: list[Group] = field(default_factory=list)
    """Groups that were taken for dead and are not."""
    lost: set[str] = field(default_factory=set)
    """Names of groups that have ended, of which the driver has not heard."""
    states: dict[str, int] = field(default_factory=dict)
    """By trial: reports whose state is on the disk."""
    deaths: dict[str, int] = field(default_factory=dict)
    """By trial: lost groups since its last new report."""
    heard: dict[str, int] = field(default_factory=dict)
    """By trial: reports that the search has heard of and decided on."""
    paused: dict[str, int] = field(default_factory=dict)
    """Trials that the search has let wait, with the samples seen."""
    told: dict[str, list[TrialRecord]] = field(default_factory=dict)
    now: float = 0.0
    num_groups: int = 0

    def submit(self) -> None:
        number = len(self.told)
        self.told[f"trial-{number}"] = []
        self.state.submit(job(number), 0.0)

    def take_up(self) -> None:
        """A trial has paused before the program was started again; its state may be lost."""
        number, count = len(self.told), self.random.choice((1, 2))
        name, reports = f"trial-{number}", tuple(report(index) for index in range(count))
        self.told[name], self.heard[name] = [], count
        self.states[name] = self.random.choice((0, count))
        self.state.take_up(
            job(number), make_record(number, "paused", reports=reports, trial_id=name)
        )
        self.paused[name] = ENDS[count - 1]

    def promote(self) -> None:
        """A paused trial goes on, or is over."""
        if self.paused:
            name = self.random.choice(list(self.paused))
            decision = Decision.CONTINUE if self.random.random() < 0.7 else Decision.STOP
            self.state.decide(name, self.paused.pop(name), decision, "not among the best")
            if decision is Decision.CONTINUE:
                self.deaths[name] = 0

    def decide_again(self) -> None:
        """What comes twice or too late, or is of nothing that is known, changes nothing."""
        decision = self.random.choice(list(Decision))
        before = self.queued_served_paused()
        self.state.decide("trial-999", 10, decision)
        for name, count in self.heard.items():
            is_last = name in self.paused
            for index in range(count - is_last):
                self.state.decide(name, ENDS[index], decision)
            if is_last:
                self.state.decide(name, self.paused[name], Decision.PAUSE)
            self.state.decide(name, 999, decision)
        assert self.queued_served_paused() == before

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
            decision = self.state.decision(given.lease, ENDS[group.index], self.now)
            if decision is Decision.STOP:
                self.ask_for_job(group)
            elif decision is Decision.CONTINUE:
                group.index, group.waits = group.index + 1, False
        elif self.random.random() < 0.05:
            self.state.fail(given.lease, End.ERROR, "a fault", 1.0)
            self.ask_for_job(group)
        else:
            name, before = given.job.trial_id, self.record(given.job.trial_id).reports
            self.states[name] = max(self.states.get(name, 0), group.index + 1)
            self.state.report(given.lease, report(group.index), 1.0, 2.0, self.now)
            if len(self.record(name).reports) > len(before):
                self.deaths[name] = 0
            group.waits = True

    def ask_for_job(self, group: Group) -> None:
        group.given, group.index, group.waits = self.state.next_job(group.name, self.now), 0, False

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
            self.state.lose(group.name, "its controller has ended")
            self.lost.add(group.name)
            if self.random.random() < 0.5:
                self.ghosts.append(group)

    def stall(self) -> None:
        """All groups at work are silent for too long."""
        self.now += self.state.stalls.limit_seconds() + 1
        held = [group for group in self.groups if group.given and self.holds(group)]
        taken = self.state.take_lost(self.now)
        assert self.lost <= set(taken), "a group that was lost is not ended"
        for name in set(taken) - self.lost:
            (group,) = [group for group in held if group.name == name]
            assert group.given is not None
            trial = group.given.job.trial_id
            self.deaths[trial] = self.deaths.get(trial, 0) + 1
            self.groups.remove(group)
            self.ghosts.append(group)
        self.lost.clear()

    def count_death(self, group: Group) -> None:
        if group.given is not None and self.holds(group):
            name = group.given.job.trial_id
            self.deaths[name] = self.deaths.get(name, 0) + 1

    def holds(self, group: Group) -> bool:
        assert group.given is not None
        return self.state._leases.get(group.given.lease) == group.name

    def search(self) -> None:
        """The search hears of a report and decides."""
        names = [name for name, told in self.told.items() if told and not self.is_over(name)]
        if not names:
            return
        name = self.random.choice(names)
        index, saved = self.heard.get(name, 0), self.told[name][-1].reports
        if index < len(saved):
            answer = saved[index]
            self.heard[name] = index + 1
            kinds = (Decision.STOP, Decision.PAUSE, Decision.CONTINUE)
            (decision,) = self.random.choices(kinds, (0.2, 0.3, 0.5))
            is_open = self.record(name).end is None
            self.state.decide(name, answer.samples_seen, decision, "below the cutoff")
            if decision is Decision.PAUSE and is_open:
                self.paused[name] = answer.samples_seen

    def follow(self) -> None:
        """Whoever keeps the results folder takes in what has happened."""
        for event in self.state.take_events():
            if isinstance(event, TrialRecord):
                before = self.told[event.trial_id]
                assert not before or before[-1].end is None, "nothing comes after the end"
                assert not before or len(event.reports) >= len(before[-1].reports)
                before.append(event)

    def record(self, name: str) -> TrialRecord:
        trial = self.state._trials.get(name)
        return self.told[name][-1] if trial is None else trial.record

    def is_over(self, name: str) -> bool:
        return bool(self.told[name]) and self.told[name][-1].end is not None

    def check(self) -> None:
        """What holds at any time."""
        queued, served, paused = self.queued_served_paused()
        is_open = [name for name in self.told if self.record(name).end is None]
        assert sorted(queued + served + paused) == sorted(is_open), "each at one place, none lost"
        assert paused == [name for name in self.told if name in self.paused], "until it is told"
        holders = [group for group in self.groups + self.ghosts if group.given]
        leases = [group.given.lease for group in holders if group.given and self.holds(group)]
        assert len(leases) == len(set(leases)) == len(served), "one group works on each"
        for name in self.told:
            seen = [r.samples_seen for r in self.record(name).reports]
            assert seen == list(ENDS[: len(seen)]), "each report once, in order"
            if self.record(name).end is End.WORKERS_DIED:
                assert self.deaths[name] >= MAX_STARTS

    def queued_served_paused(self) -> tuple[list[str], list[str], list[str]]:
        """Return the trials in each state."""
        return (
            [trial.job.trial_id for trial in self.state._queue],
            [trial.job.trial_id for trial in self.state._serving.values()],
            [name for name in self.told if self.record(name).state == "paused"],
        )

    def settle(self) -> None:
        """Nothing goes wrong any more: all trials end."""
        self.add_group()
        for _ in range(60 * len(self.told) + 60):
            for group in self.groups + self.ghosts:
                self.work_in(group)
            self.follow()
            for _ in range(4 * len(self.told)):
                self.search()
                self.promote()
            if all(map(self.is_over, self.told)):
                break
        self.check()
        assert [name for name in self.told if not self.is_over(name)] == []
        assert self.state.is_idle and not self.state._trials


EVENTS = (
    World.submit, World.take_up, World.decide_again, World.add_group,
    World.lose, World.restart, World.stall, *[World.promote] * 2,
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
        world.state.close(reason)
        for name, samples in world.paused.items():
            world.state.decide(name, samples, Decision.CONTINUE)  # too late
            assert world.record(name).end is (End.SEARCH_ENDED if reason else None)
            assert world.record(name).is_paused == (reason is None)
        for _ in range(3):
            for group in world.groups + world.ghosts:
                world.work_in(group)
        for group in world.groups + world.ghosts:
            assert world.state.next_job(group.name, 0.0) is None
        assert world.state.is_idle
        for name in world.told:
            record = world.record(name)
            if record.end is None:
                assert reason is None or not record.reports, "what has a report is not thrown away"
