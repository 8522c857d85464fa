"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

# PyTorch's threads wait for each other in a busy loop, which makes tests many times slower on cores that do other work
# too. It has to be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# The problems are small: more threads only cost time, and two are the same everywhere.
torch.set_num_threads(2)

# Times depend on the machine, and a failure should come back in the next run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 as the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference files beside the repository, which most checkouts do not have."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the reference files in {folder}, which do not come with the repository")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
