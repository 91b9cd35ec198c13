"""What all tests share: one thread for torch, and prepared data of their own."""

import os
import shutil
import tempfile

import pytest

# Read when torch is first imported, here and in the Ray workers that tests start. Results on CPU
# repeat to the bit for an equal number of threads, and tests run beside each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Read when huggingface_hub is first imported, here and in what tests start.
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="nanovlm-tests-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # a run without GPU tests need not wait for it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
