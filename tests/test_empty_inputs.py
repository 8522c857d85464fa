"""Batches without samples, and samples without unknowns."""

import pytest
import torch

from implicit import FixedPointLayer, differentiable, root
from solvers import Status

SHAPES = [(0, 3), (3, 0), (0, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"rtol": None, "atol": None, "max_steps": 3}], ids=["tested", "fixed"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "squarem"])
@pytest.mark.parametrize("backward", ["unrolled", "checkpointed", "implicit", "phantom", "jfb"])
def test_layers(backward, solver, options, shape):
    x = torch.zeros(shape, requires_grad=True)
    z = FixedPointLayer(lambda z, x: 0.5 * z + x, backward=backward, solver=solver, **options)(x)
    z.sum().backward()
    assert z.shape == x.grad.shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", ["newton", "newton_krylov", "broyden", "auto"])
def test_roots(solver, shape):
    x = torch.zeros(shape, requires_grad=True)
    z, solution = root(lambda z, x: z - 1 + x, torch.zeros(shape), x, solver=solver, return_solution=True)
    z.sum().backward()
    assert z.shape == x.grad.shape == shape
    assert solution.status.tolist() == [Status.CONVERGED] * shape[0]


def test_answers_of_other_code():
    same = differentiable(optimality=lambda z, x: z - x)(lambda x: x.clone())
    x = torch.zeros(0, 3, requires_grad=True)
    same(x).sum().backward()
    assert x.grad.shape == (0, 3)
    for function in (torch.func.vmap(same), torch.func.vmap(torch.func.grad(lambda x: same(x).sum()))):
        with pytest.raises(ValueError, match="over a dimension of size 0, so it is never called"):
            function(x.detach())
