"""Which tests run side by side with `pytest -n`.

The tests of a file stay in one process, for they share what takes long to set up. Those that use
the session's Ray cluster (fixture `ray_cluster`) stay in one process all together, so that there
is one such cluster. Files that take long come first, so that at the end no process waits for
another.
"""

import re
from functools import cache

from xdist.scheduler import LoadScopeScheduling

SHARED_CLUSTER = "tests of the shared cluster"
USES_CLUSTER = re.compile(r'\bray_cluster(: |"\))')  # as a parameter, or with usefixtures


class ByFile(LoadScopeScheduling):
    """Hands files out to processes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return SHARED_CLUSTER if USES_CLUSTER.search(self._text(path)) else path

    def _assign_work_unit(self, node: object) -> None:
        longest = min(self.workqueue, key=self._turn)
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _turn(self, scope: str) -> int:
        if scope == SHARED_CLUSTER:
            return 0
        marks = ("pytest.mark.ray", "pytest.mark.slow")
        return next((n for n, mark in enumerate(marks, 1) if mark in self._text(scope)), 3)

    @cache  # noqa: B019  # one scheduler, to the end of the process
    def _text(self, path: str) -> str:
        return (self.config.rootpath / path).read_text(encoding="utf-8")
