"""Which tests run side by side with `pytest -n`.

The tests of a file stay in one process, for they share what takes long to set up. Those that start
Ray stay in one process all together: a session has one cluster, and programs with Ray run one
after another. Files that take long come first, so that at the end no process waits for another.
"""

from functools import cache

from xdist.scheduler import LoadScopeScheduling

RAY = "tests that start Ray"


class ByFile(LoadScopeScheduling):
    """Hands files out to processes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return RAY if self._has_mark(path, "ray") else path

    def _assign_work_unit(self, node: object) -> None:
        longest = min(self.workqueue, key=lambda scope: (scope != RAY, not self._is_slow(scope)))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _is_slow(self, scope: str) -> bool:
        return scope != RAY and self._has_mark(scope, "slow")

    @cache  # noqa: B019  # one scheduler, to the end of the process
    def _has_mark(self, path: str, name: str) -> bool:
        return f"pytest.mark.{name}" in (self.config.rootpath / path).read_text(encoding="utf-8")
