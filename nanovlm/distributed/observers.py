"""Who watches every run, whoever started it."""

from nanovlm.distributed.auth_token import AuthTokenGuard
from nanovlm.distributed.gauges import Gauges
from nanovlm.observer import Observer
from nanovlm.results.report_writer import ReportWriter
from nanovlm.tracking.tensorboard import TensorBoardLogs
from nanovlm.tracking.wandb_runs import WandbRuns


def standard_observers() -> list[Observer]:
    """Return the observers of a run. W&B's does nothing unless the run's configuration wants it."""
    return [ReportWriter(), TensorBoardLogs(), WandbRuns(), Gauges(), AuthTokenGuard()]
