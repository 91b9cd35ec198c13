"""Which tests run side by side with `pytest -n`.

The tests of a file stay in one process, for they share what takes long to set up. Files that share
a fixture of the session which starts Ray, the cluster (`ray_cluster`) or the search that is run
once (`search`), stay in one process all together. What takes long comes first, so that at the end
no process waits for another.
"""

import re
from functools import cache

from xdist.scheduler import LoadScopeScheduling

SHARED = {
    "tests of the cluster": re.compile(r'\bray_cluster(: |"\))'),  # a parameter, or usefixtures
    "tests of the search": re.compile(r"\bsearch: Finished"),
}
"""By name, how a test file asks for what the session has once."""


class ByFile(LoadScopeScheduling):
    """Hands files out to processes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        text = self._text(path)
        return next((name for name, asks in SHARED.items() if asks.search(text)), path)

    def _assign_work_unit(self, node: object) -> None:
        longest = min(self.workqueue, key=self._turn)
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _turn(self, scope: str) -> int:
        if scope in SHARED:
            return 0
        marks = ("pytest.mark.ray", "pytest.mark.slow")
        return next((n for n, mark in enumerate(marks, 1) if mark in self._text(scope)), 3)

    @cache  # noqa: B019  # one scheduler, to the end of the process
    def _text(self, path: str) -> str:
        return (self.config.rootpath / path).read_text(encoding="utf-8")
