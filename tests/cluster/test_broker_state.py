"""Which group works on which trial: single rules of the state."""

from nanovlm.cluster.broker_state import MAX_STARTS, BrokerState
from nanovlm.cluster.stalls import (
    FIRST_STALL_SECONDS,
    LEAST_STALL_SECONDS,
    LEAST_START_SECONDS,
    STALL_FACTOR,
)
from nanovlm.messages import Assignment, Decision, End, Leg, Notice, TrialRecord
from tests.cluster.short_trials import ENDS, job, report, update
from tests.records import make_record


def take(state: BrokerState, group: str, now: float = 0.0) -> Assignment:
    given = state.next_job(group, now)
    assert given is not None, f"{group} gets a job"
    return given


def texts(state: BrokerState) -> list[str]:
    return [event.text for event in state.take_events() if isinstance(event, Notice)]


def records(state: BrokerState) -> list[TrialRecord]:
    return [event for event in state.take_events() if isinstance(event, TrialRecord)]


def test_a_lost_group_s_trial_goes_on_elsewhere_and_its_lease_has_ended() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    first = take(state, "group-0")
    state.report(first.lease, report(0), 1.0, 2.0, 1.0)
    state.decide("trial-0", 10, Decision.CONTINUE)
    state.take_events()
    state.lose("group-0", "its controller has ended (killed)")
    assert texts(state) == [
        "group-0: its controller has ended (killed); trial-0 goes on from its last report in a "
        "free group"
    ]
    second = take(state, "group-1")
    assert second.job == first.job
    state.report(first.lease, report(1), 1.0, 3.0, 2.0)  # the group was alive after all
    state.fail(first.lease, End.ERROR, "too late", 3.0)
    state.progress(first.lease, update(0), 3.0)
    assert state.decision(first.lease, 20, 3.0) is Decision.STOP
    assert state.next_job("group-0", 3.0) is None and state.is_lost("group-0")
    state.report(second.lease, report(0), 5.0, 6.0, 4.0)  # made again from the state
    assert state.decision(second.lease, 10, 4.0) is Decision.CONTINUE
    state.report(second.lease, report(1), 5.0, 7.0, 5.0)
    *_, last = records(state)
    assert (last.worker_group, last.samples_seen, last.first_step_at) == ("group-1", 20, 1.0)


def test_a_trial_that_kills_its_workers_is_given_up_unless_it_comes_further() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    for index in range(2):
        for _ in range(MAX_STARTS - 1 - index):  # the group of the report before counts too
            take(state, "group-0")
        state.report(take(state, "group-0").lease, report(index), 1.0, 2.0, 1.0)
        state.decide("trial-0", ENDS[index], Decision.CONTINUE)
    for _ in range(MAX_STARTS - 1):
        take(state, "group-0")
    assert state.next_job("group-0", 0.0) is None
    *_, last = records(state)
    assert last.end is End.WORKERS_DIED and last.is_infeasible
    assert last.reason == (
        "its workers died 3 times without coming further; last group-0: a worker has ended"
    )


def test_silence_is_measured_where_a_group_is_at_work() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    assert state.stalls.limit_seconds() == FIRST_STALL_SECONDS
    lease = take(state, "group-0", now=100.0).lease
    state.progress(lease, update(0), 190.0)
    state.report(lease, report(0), 1.0, 2.0, now=200.0)
    assert state.stalls.limit_seconds() == STALL_FACTOR * 90.0
    waited = 200.0 + 10 * FIRST_STALL_SECONDS
    assert state.take_lost(waited) == []  # it waits for the search, which may take its time
    state.decide("trial-0", 10, Decision.CONTINUE)
    assert state.decision(lease, 10, waited) is Decision.CONTINUE
    assert state.take_lost(waited + 900.0) == []
    assert state.take_lost(waited + 901.0) == ["group-0"]
    assert texts(state) == [
        "group-0: no sign of life for 15 minutes; trial-0 goes on from its last report in a free "
        "group"
    ]


def test_the_least_silence_and_a_given_one() -> None:
    state, given = BrokerState(), BrokerState(stall_seconds=7.0)
    for one in (state, given):
        one.submit(job(0), 0.0)
        one.report(take(one, "group-0").lease, report(0), 1.0, 2.0, now=1.0)
    assert state.stalls.limit_seconds() == LEAST_STALL_SECONDS
    assert given.stalls.limit_seconds() == 7.0


def test_many_groups_are_to_send_their_updates_less_often() -> None:
    for limit_seconds, longest in ((None, 4.0), (10.0, 1.0)):  # no group is lost for it
        state = BrokerState(limit_seconds)
        between = []
        for number in range(200):
            state.submit(job(number), 0.0)
            between.append(take(state, f"group-{number}").seconds_between_updates)
        assert between[0] <= 1.0, "one group sends all that it has, one a second"
        assert between[-1] == longest, "200 groups send 50 a second"


def test_a_group_that_never_asks_for_a_job_is_lost() -> None:
    state, given = BrokerState(), BrokerState(stall_seconds=7.0)
    for one in (state, given):
        for group in ("late", "waits", "has ended"):
            one.stalls.expect(group, 100.0)
        assert one.next_job("waits", 101.0) is None  # there is none, and it waits for one
        one.lose("has ended", "a node has no package 'torch'")
        assert one.take_lost(101.0) == ["has ended"]
    for one, limit in ((state, FIRST_STALL_SECONDS), (given, LEAST_START_SECONDS)):
        assert one.take_lost(100.0 + limit) == []
        assert one.take_lost(100.1 + limit) == ["late"]
        assert one.take_lost(1e9) == [] and one.is_lost("late")
    assert texts(given)[1:] == ["late: no sign of life for 2 minutes"]


def test_a_metric_that_is_not_finite_ends_the_trial() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    lease = take(state, "group-0").lease
    state.report(lease, report(0, float("nan")), 1.0, 2.0, 1.0)
    *_, last = records(state)
    assert (last.end, last.reports) == (End.NOT_FINITE, ())
    assert last.reason == "mmstar_accuracy is nan after 10 samples"


def test_a_run_that_cannot_go_on_ends_no_trial() -> None:
    """Such as on a full disk: it is no failure of the trial's, whatever ranks say afterwards."""
    state = BrokerState()
    for number in range(3):
        state.submit(job(number), at=0.0)
    first, second = take(state, "a"), take(state, "b")
    state.report(second.lease, report(0), 0.5, 1.0, now=1.0)
    state.take_events()
    state.abort("trial-0: no space left")
    state.abort("trial-1: no space left")
    state.fail(first.lease, End.ERROR, "rank 1 has lost rank 0", at=2.0)
    assert state.next_job("a", now=3.0) is state.next_job("b", now=3.0) is None
    assert state.take_events() == [Notice(text="trial-0: no space left", ends_run=True)]
    assert state.is_closed and state.is_idle


def test_a_paused_trial_waits_until_it_is_told_and_goes_on_elsewhere() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    first = take(state, "group-0")
    state.report(first.lease, report(0), 1.0, 2.0, 1.0)
    state.decide("trial-0", 10, Decision.PAUSE)
    *_, paused = records(state)
    assert (paused.state, paused.end, paused.worker_group) == ("paused", None, "group-0")
    assert state.decision(first.lease, 10, 2.0) is Decision.STOP
    assert state.next_job("group-0", 3.0) is None and state.is_idle
    state.decide("trial-0", 10, Decision.CONTINUE)
    state.decide("trial-0", 10, Decision.STOP, "too late")
    *_, queued = records(state)
    assert (queued.state, queued.worker_group) == ("running", None)
    second = take(state, "group-1")
    state.report(second.lease, report(0), 5.0, 6.0, 5.0)  # made again from the state
    assert state.decision(second.lease, 10, 5.0) is Decision.CONTINUE
    state.report(second.lease, report(1), 5.0, 7.0, 6.0)
    state.decide("trial-0", 20, Decision.PAUSE)
    state.decide("trial-0", 20, Decision.STOP, "not among the best")
    *_, last = records(state)
    assert (last.end, last.reason) == (End.PRUNED, "not among the best")
    assert (last.is_paused, last.samples_seen, last.ended_at) == (False, 20, 7.0)
    assert last.legs == (
        Leg(worker_group="group-0", first_step_at=1.0, ended_at=2.0),
        Leg(worker_group="group-1", first_step_at=5.0, ended_at=7.0),
    )


def test_promoted_trials_are_taken_up_in_the_order_in_which_they_were_asked_for() -> None:
    state = BrokerState()
    state.take_up(job(0), make_record(0, "paused", reports=[report(0)], trial_id="trial-0"))
    state.submit(job(1), 0.0)
    assert [record.state for record in records(state)] == ["paused", "running"]
    state.decide("trial-0", 10, Decision.CONTINUE)
    assert [take(state, name).job.number for name in ("a", "b")] == [1, 0]


def test_a_pause_counts_for_a_trial_whose_group_was_lost_meanwhile() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    state.report(take(state, "a").lease, report(0), 1.0, 2.0, 1.0)
    state.lose("a", "its controller has ended")
    state.decide("trial-0", 10, Decision.PAUSE)
    assert state.next_job("b", 1.0) is None
    state.decide("trial-0", 10, Decision.CONTINUE)
    for _ in range(MAX_STARTS - 1):  # each pause begins anew to count lost groups
        take(state, "b")
    assert take(state, "b").job.number == 0


def test_each_group_that_brings_a_trial_further_has_a_leg_of_it() -> None:
    state = BrokerState()
    state.submit(job(0), 0.0)
    first = take(state, "a")
    for index in range(2):
        state.report(first.lease, report(index), 1.0, 2.0 + index, 1.0)
        state.decide("trial-0", ENDS[index], Decision.CONTINUE)
    state.lose("a", "its controller has ended")
    lost = take(state, "b")
    state.report(lost.lease, report(1), 3.5, 3.6, 2.0)  # made again from the state
    state.lose("b", "its controller has ended")
    last = take(state, "c")
    state.fail(last.lease, End.ERROR, "a fault", 5.0)
    *_, record = records(state)
    assert record.legs == (
        Leg(worker_group="a", first_step_at=1.0, ended_at=3.0),
        Leg(worker_group="c", first_step_at=None, ended_at=5.0),
    )
