"""What the broker knows of one trial."""

from dataclasses import dataclass, field, replace

from nanovlm.messages import Decision, Job, Leg, TrialRecord


@dataclass(eq=False)
class BrokerTrial:
    """A trial, and what its decisions and its groups have left."""

    job: Job
    record: TrialRecord
    lease: int | None = None
    """None while it is in the queue or paused, and after its end."""
    num_reports_taken: int = 0
    """That the driver knows."""
    decisions: dict[int, Decision] = field(default_factory=dict)
    """On its reports, by the samples seen."""
    num_starts: int = 0
    """Since its last report."""
    num_legs_before: int = 0
    """Legs of other groups, or of this one before a pause."""

    @property
    def is_open(self) -> bool:
        return self.record.end is None

    @property
    def awaits_decision(self) -> bool:
        return bool(self.record.reports) and self.record.samples_seen not in self.decisions

    def extend_leg(self, first_step_at: float | None, at: float) -> None:
        """Record that the trial's group was at work until now."""
        group, legs = self.record.worker_group, self.record.legs
        assert group is not None, f"{self.job.trial_id} is in no group"
        if len(legs) > self.num_legs_before:
            leg = replace(legs[-1], ended_at=at)
        else:
            leg = Leg(worker_group=group, first_step_at=first_step_at, ended_at=at)
        self.record = replace(self.record, legs=(*legs[: self.num_legs_before], leg))
