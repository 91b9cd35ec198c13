"""What all tests share: one thread for torch, prepared data of their own, one Ray cluster.

With `pytest -n`, the tests of a file stay in one process, and all that use `ray_cluster` in one.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fake_hub import FakeHub

if TYPE_CHECKING:
    from nanovlm.cluster.ray_cluster import Cluster

# Read when torch is first imported, here and in the Ray workers that tests start. Results on CPU
# repeat to the bit for an equal number of threads, and tests run beside each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Read at the first product on a GPU; deterministic algorithms ask for it.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

# Read when huggingface_hub is first imported, here and in what tests start. Processes of `-n`
# inherit it: what one has prepared serves the others.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="nanovlm-tests-")


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.scheduling import ByFile  # asked for with `-n` alone, which needs pytest-xdist

    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # a run without GPU tests need not wait for it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.use_deterministic_algorithms(False)  # a trial on the CPU leaves them on


@pytest.fixture(scope="session")
def ray_cluster() -> "Iterator[Cluster]":
    """Return a Ray cluster of this process, for all tests that need no other.

    It passes gauges on every second and forgets them after two.
    """
    from nanovlm.cluster.ray_cluster import connect  # a run without Ray need not wait for it

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        before = os.umask(0o077)  # Ray may write its token, and programs tell of one that is open
        with connect(None) as cluster:
            os.umask(before)
            yield cluster


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a hub that holds nothing yet, which this process asks, with an empty cache."""
    from huggingface_hub import constants

    from nanovlm import downloads

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        downloads.forget_downloads()
        yield hub
        downloads.forget_downloads()
