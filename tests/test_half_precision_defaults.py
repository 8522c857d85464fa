"""What a solve asks for where nothing is said and the map rounds coarsely."""

import copy
import pickle

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, jacobian_regularization, spectral_norm
from solvers import Stopping, solve


class Cell(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.inner = spectral_norm(nn.Linear(width, width), coeff=0.9)
        self.outer = nn.Linear(width, width)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + self.outer(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "auto"])
def test_healthy_maps_converge_in_half_precision_as_they_are(solver, dtype, autocast):
    """Without a warning (which is an error in the tests), forward and backward, and as exactly as the dtype allows."""
    for seed in range(3):
        torch.manual_seed(seed)
        cell, x = Cell().eval(), torch.randn(16, 32)
        exact = FixedPointLayer(cell, rtol=1e-6, max_steps=200)(x)
        exact.sum().backward()
        truth, cell.outer.weight.grad = cell.outer.weight.grad, None
        layer = FixedPointLayer(cell, solver=solver)
        with torch.autocast("cpu", dtype, enabled=autocast):
            if not autocast:
                layer, x = layer.to(dtype), x.to(dtype)
            z, solution = layer(x, return_solution=True)
        z.float().sum().backward()
        assert solution.converged.all()
        assert solution.adjoint.converged.all()
        eps = torch.finfo(dtype).eps
        assert (z.float() - exact).norm() < 2 * eps * exact.norm()
        assert (layer.f.outer.weight.grad.float() - truth).norm() < 3 * eps * truth.norm()


def test_a_tolerance_that_was_given_is_taken_at_its_word():
    def f(z):
        return 0.5 * torch.cos(z)

    z0 = torch.linspace(0, 1, 8, dtype=torch.bfloat16).unsqueeze(1)
    loose, strict = (solve(f, z0, "picard", on_failure="ignore", **kw) for kw in ({}, {"rtol": 1e-4}))
    assert loose.num_evals < strict.num_evals
    assert (strict.residual[strict.converged] <= 1e-4).all()
    for rule in (Stopping(), Stopping(max_steps=9), copy.deepcopy(Stopping()), pickle.loads(pickle.dumps(Stopping()))):
        assert rule.rtol == 1e-4
        assert rule.resolved(1e-3).rtol == 1e-3
        assert rule.resolved(1e-7).rtol == 1e-4
    assert Stopping(rtol=1e-4).resolved(1e-3).rtol == 1e-4
    layer = FixedPointLayer(f)
    layer.max_steps = 60
    assert layer.stopping.resolved(1e-3).rtol == 1e-3


def test_attention_can_be_regularized():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    z, x = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    jacobian_regularization(lambda z, x: attention(z, z, z, need_weights=False)[0] + x, z, x).sum().backward()
    assert attention.in_proj_weight.grad.abs().sum() > 0
