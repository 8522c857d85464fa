"""What the backward modes cost: bytes saved for the backward pass, calls of the map."""

import pytest
import torch
from torch import nn

from implicit import JFB, SHINE, Checkpointed, FixedPointLayer, Implicit, Phantom, Unrolled, fixed_point
from solvers import Anderson, Broyden, Picard
from solvers.linear import NeumannSeries


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def saved_bytes(backward, steps, solver):
    """Every storage once, as it is kept alive in the meantime; and the inverse that SHINE keeps."""
    layer = FixedPointLayer(Cell(), solver=solver, backward=backward, rtol=None, atol=None, max_steps=steps)
    x = torch.randn(50, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z, solution = layer(x, return_solution=True)
    if isinstance(backward, SHINE):
        kept += [solution.state.inverse.u, solution.state.inverse.v]
    total = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    z.sum().backward()
    return total


@pytest.mark.parametrize(
    ("backward", "solver"),
    [
        (Implicit(), Picard()),
        (Implicit(), Anderson()),
        (Implicit(linear_solver=NeumannSeries()), Picard()),
        (Phantom(steps=1), Anderson()),
        (JFB(), Picard()),
        (SHINE(), Broyden(memory=3)),
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_steps(backward, solver):
    assert saved_bytes(backward, 4, solver) == saved_bytes(backward, 256, solver) > 0


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2)], ids=str)
def test_memory_of_the_unrolled_modes(solver):
    """Linear, and as the square root: sixteen times the steps take sixteen and four times the memory."""
    unrolled = saved_bytes(Unrolled(), 256, solver) / saved_bytes(Unrolled(), 16, solver)
    assert 14 < unrolled < 20
    checkpointed = saved_bytes(Checkpointed(), 256, solver) / saved_bytes(Checkpointed(), 16, solver)
    assert 3 < checkpointed < 5
    # A repeated segment adds what its steps save, once at a time: at 256 steps that of 16.
    assert (
        saved_bytes(Checkpointed(), 256, solver) + saved_bytes(Unrolled(), 16, solver)
        < saved_bytes(Unrolled(), 256, solver) / 3
    )


@pytest.mark.parametrize(
    ("backward", "forward", "after"),
    [
        (Unrolled(), 0, 0),
        (Checkpointed(segments=3), 0, 8),  # all but the first evaluation, which belongs to no segment
        (Implicit(), 0, 1),
        (SHINE(), 0, 1),
        (Phantom(steps=4), 4, 0),
        (JFB(), 1, 0),
    ],
    ids=str,
)
def test_calls_of_the_map(backward, forward, after):
    """Beside those of the solver."""
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        return 0.5 * torch.sin(z) + x

    x = torch.randn(5, 2, requires_grad=True)
    options = {"rtol": None, "atol": None, "max_steps": 9, "return_solution": True}
    z, solution = fixed_point(f, torch.zeros(5, 2), x, solver="broyden", backward=backward, **options)
    assert solution.num_evals == 9
    assert calls == 9 + forward
    z.sum().backward()
    assert calls == 9 + forward + after
