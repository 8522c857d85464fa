"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

# One thread in each process of the tests and in those that they start: the problems are small, and `make test` runs one
# process per core. Where a test asks for more threads, GOMP_SPINCOUNT keeps them from waiting for each other in a busy
# loop, which is many times slower on cores that do other work too. PyTorch reads all of these when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)

# Times depend on the machine, and a failure should come back in the next run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


# For what modules of tests draw when they are imported.
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 as the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs of ``compile=True`` are traced as for Inductor, and run as they are, which saves its time."""
    from torch._dynamo.utils import counters

    from solvers import _compiled

    def clear() -> None:
        _compiled._compiled.cache_clear()
        _compiled._refused.clear()
        _compiled._not_replayed.clear()
        torch.compiler.reset()
        counters.clear()

    monkeypatch.setattr(_compiled, "BACKEND", "eager")
    clear()
    yield
    clear()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let a test choose its own precision: Accelerate keeps the first one for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in its own folder, where relative paths lead."""
    monkeypatch.chdir(tmp_path)


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
