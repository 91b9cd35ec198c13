"""A trial that only shows that its workers have met, and on which ports they listen.

In a module of its own, so that Ray's workers find it.
"""

import ipaddress
from collections.abc import Callable, Generator, Iterable

import psutil
import torch

from nanovlm import parallel
from nanovlm.messages import Job, Report
from nanovlm.resources import Resources
from nanovlm.training.meter import OnUpdate, ignore


def open_ports(processes: Iterable[psutil.Process]) -> dict[str, list[str]]:
    """Return the ports on which processes listen for other machines too, by the process's name."""
    found = dict[str, list[str]]()
    for process in processes:
        for connection in process.net_connections("inet"):
            address = ipaddress.ip_address(connection.laddr.ip)
            mapped = getattr(address, "ipv4_mapped", None)
            if connection.status == psutil.CONN_LISTEN and not (mapped or address).is_loopback:
                found.setdefault(process.name(), []).append(f"{address}:{connection.laddr.port}")
    return found


def meet(
    job: Job, resources: Resources, interrupted: Callable[[], bool], on_update: OnUpdate = ignore
) -> Generator[Report, None, None]:
    """Report the sum of the ranks, each plus 1, over all workers."""
    ranks = torch.tensor([parallel.rank() + 1.0])
    parallel.all_reduce_sum_([ranks])
    ports = parallel.gather_objects(open_ports([psutil.Process()]))
    yield Report(
        samples_seen=1,
        step=1,
        metrics={"mmstar_accuracy": ranks.item()},
        seconds=1.0,
        is_final=True,
        notes=tuple(str(each) for each in ports if each),
    )
