"""What all tests share: one thread for torch, and prepared data of their own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

# Read when torch is first imported, here and in the Ray workers that tests start. Results on CPU
# repeat to the bit for an equal number of threads, and tests run beside each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Read at the first product on a GPU; deterministic algorithms ask for it.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

# Read when huggingface_hub is first imported, here and in what tests start.
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="nanovlm-tests-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # a run without GPU tests need not wait for it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.use_deterministic_algorithms(False)  # a trial on the CPU leaves them on


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a hub that holds nothing yet, which this process asks, with an empty cache."""
    from huggingface_hub import constants

    from nanovlm.models import model_files

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        model_files.forget_downloads()
        yield hub
        model_files.forget_downloads()
