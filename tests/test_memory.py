"""How many vectors of the state's size a solve holds at once, the start and what the map needs within aside."""

import gc

import pytest
import torch

from solvers import Anderson, Broyden, Picard, Solver, Squarem, solve
from solvers.testing import PeakMemory

ROWS: dict[str, tuple[Solver, int]] = {
    "picard": (Picard(), 3),
    "squarem": (Squarem(), 9),
    **{f"anderson {m}": (Anderson(memory=m), 2 * m + 6) for m in (1, 5, 10, 20)},
    "anderson 5 damped": (Anderson(memory=5, damping=0.7), 16),
    **{f"broyden {m}": (Broyden(memory=m), 2 * m + 6) for m in (5, 10, 20)},
    **{f"broyden bad {m}": (Broyden(method="bad", memory=m), 2 * m + 7) for m in (5, 10)},
}


@pytest.mark.parametrize("tested", [False, True], ids=["fixed steps", "to a tolerance"])
@pytest.mark.parametrize("solver", ROWS)
def test_vectors_at_once(solver, tested):
    method, vectors = ROWS[solver]
    z0 = torch.zeros(4, 20_000)
    shift, rate = torch.linspace(-1, 1, z0.numel()).view_as(z0), torch.linspace(0.5, 0.95, 20_000)
    options = {"rtol": 1e-30, "atol": 0.0} if tested else {"rtol": None, "atol": None}
    with torch.no_grad(), PeakMemory() as memory:
        solve(lambda z: torch.addcmul(shift, rate, z), z0, method, max_steps=45, on_failure="ignore", **options)
    # A test keeps the best value, where that is not the last.
    assert vectors - 2 < memory.peak / (z0.numel() * z0.element_size()) < vectors + tested + 0.1


def test_counts_what_lives_at_once():
    with PeakMemory() as memory:
        x = torch.zeros(100)  # 400 bytes
        views = x.view(10, 10)[2:], x.unsqueeze(0)
        assert memory.peak == 400
        x.add_(1.0)
        y = x + 1
        del x, views, y
        gc.collect()
        z = torch.zeros(50)
    assert memory.peak == 800
    assert z.numel() == 50
