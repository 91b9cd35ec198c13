"""Asks the cluster for nodes for the trials that wait, as its autoscaler understands it.

An autoscaler adds nodes for reservations that wait for room. So each worker group that is wanted
and has no room yet is stood for by a placement group. As soon as that has got its room, it hands it
over by going away: the worker group reserves its own.
"""

from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from nanovlm.config.search_settings import TrialResources


class NodeRequests:
    """The reservations of a run that wait; they end with the program at the latest."""

    def __init__(self, resources: TrialResources) -> None:
        """
        Args:
            resources: what each worker group occupies.
        """
        self._bundles = [resources.per_worker for _ in range(resources.workers)]
        self._waiting: list[PlacementGroup] = []

    def update(self, num_wanted: int) -> None:
        """Let as many reservations wait as there are worker groups without room; end those that
        have got room by now."""
        for reservation in list(self._waiting):
            if placement_group_table(reservation)["state"] == "CREATED":
                self._end(reservation)
        while len(self._waiting) > max(0, num_wanted):
            self._end(self._waiting[-1])
        while len(self._waiting) < num_wanted:
            self._waiting.append(placement_group(self._bundles, strategy="PACK"))

    def _end(self, reservation: PlacementGroup) -> None:
        self._waiting.remove(reservation)
        remove_placement_group(reservation)
