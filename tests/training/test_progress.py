"""When a trial tells how far it is, and how fast, on a clock that the test sets."""

from nanovlm.messages import ProgressUpdate
from nanovlm.training.meter import UpdateTimer


class Watched:
    """An update timer with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.updates: list[ProgressUpdate] = []
        self.taker = UpdateTimer("trial-0001", 8, 50, self.updates.append, clock=lambda: self.now)

    def step(self, step: int, seconds: float, waited: float = 0.0) -> None:
        self.now += seconds
        self.taker.after_step(step, train_loss=1 / step, waited_seconds=waited)


def test_an_update_a_second_with_the_rates_since_the_one_before() -> None:
    watched = Watched()
    watched.step(1, seconds=30.0, waited=5.0)  # compiles: counts for no rate
    for step in range(2, 10):
        watched.step(step, seconds=0.4, waited=5.0 + 0.1 * (step - 1))
    assert [update.step for update in watched.updates] == [4, 7]
    assert watched.updates[1] == ProgressUpdate(
        trial_id="trial-0001",
        stage="training",
        step=7,
        samples_seen=56,
        total_samples=400,
        train_loss=1 / 7,
        samples_per_second=watched.updates[1].samples_per_second,
        data_wait_fraction=watched.updates[1].data_wait_fraction,
    )
    for update in watched.updates:
        assert abs(update.samples_per_second - 20) < 1e-6
        assert abs(update.data_wait_fraction - 0.25) < 1e-6


def test_an_evaluation_is_told_at_once_and_counts_for_no_rate() -> None:
    watched = Watched()
    for step in range(1, 5):
        watched.step(step, seconds=0.5)
    watched.taker.evaluation_begins()
    watched.now += 60.0
    watched.taker.training_goes_on()
    watched.step(5, seconds=0.5)
    watched.step(6, seconds=0.5)
    stages = [(update.stage, update.step, update.samples_per_second) for update in watched.updates]
    assert stages == [("training", 3, 16.0), ("evaluating", 4, 16.0), ("training", 6, 16.0)]


def test_a_trial_that_is_faster_than_a_second_tells_nothing_of_its_steps() -> None:
    watched = Watched()
    for step in range(1, 51):
        watched.step(step, seconds=0.01)
    assert watched.updates == []
