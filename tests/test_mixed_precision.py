"""Autocast, and states in half precision: gradients near those of float32, algebra in float32."""

import copy
import warnings

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, Implicit
from solvers.linear import GMRES, BiCGStab, NeumannSeries

BACKWARDS = {
    "unrolled": "unrolled",
    "gmres": "implicit",
    "bicgstab": Implicit(linear_solver=BiCGStab()),
    "series": Implicit(linear_solver=NeumannSeries(terms=20)),
}
all_backwards = pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class TanhMap(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.dtypes = []
        with torch.no_grad():
            self.linear.weight.mul_(0.6 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z, x):
        output = self.linear(z)
        self.dtypes.append((z.dtype, output.dtype))
        return torch.tanh(output + x)


def gradients(layer, x):
    """Those of the parameters and of x, as one vector in float64; any warning is an error."""
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, solution = layer(x, return_solution=True)
        found = torch.autograd.grad(z.float().square().sum(), (*layer.parameters(), x))
    return z, solution, torch.cat([gradient.flatten().double() for gradient in found])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@all_backwards
def test_gradients_under_autocast(backward, solver):
    layer = FixedPointLayer(TanhMap(), solver=solver, backward=backward, rtol=5e-3)
    x = torch.randn(32, 16)
    *_, exact = gradients(FixedPointLayer(layer.f, solver=solver, backward=backward, rtol=1e-5), x)
    layer.f.dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, solution, found = gradients(layer, x)
    assert set(layer.f.dtypes) == {(torch.float32, torch.bfloat16)}  # in the backward pass, too
    assert z.dtype == solution.state.z.dtype == solution.residual.dtype == torch.float32
    assert relative(found, exact) < 1e-2


@all_backwards
def test_the_backward_pass_may_run_outside_autocast(backward):
    layer = FixedPointLayer(TanhMap(), backward=backward, rtol=5e-3)
    x = torch.randn(32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, inside = gradients(layer, x)
        z = layer(x)
    outside = torch.autograd.grad(z.square().sum(), list(layer.parameters()))
    assert relative(torch.cat([g.flatten().double() for g in outside]), inside[: -x.numel()]) < 5e-3


def test_the_adjoint_is_solved_in_float32_under_autocast():
    layer = FixedPointLayer(TanhMap(), rtol=5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, solution, _ = gradients(layer, torch.randn(8, 16))
    adjoint = solution.adjoint
    assert all(leaf.dtype == torch.float32 for leaf in adjoint.value)
    assert adjoint.residual.max() < torch.finfo(torch.bfloat16).eps


@halves
@all_backwards
def test_states_in_half_precision(backward, dtype):
    layer = FixedPointLayer(TanhMap(), backward=backward, rtol=2e-3 if dtype == torch.float16 else 1e-2)
    x = torch.randn(32, 16).to(dtype)
    twin = FixedPointLayer(copy.deepcopy(layer.f).to(dtype).float(), backward=backward, rtol=1e-5)
    layer.to(dtype)
    z, solution, found = gradients(layer, x)
    assert z.dtype == dtype
    assert solution.state.z.dtype == torch.float32
    *_, exact = gradients(twin, x.float())
    assert relative(found, exact) < 2e-2


@halves
def test_second_derivatives_in_half_precision(dtype):
    layer = FixedPointLayer(TanhMap(), backward=Implicit(linear_solver=GMRES(rtol=1e-2)), rtol=1e-2).to(dtype)
    x = torch.randn(8, 16).to(dtype).requires_grad_()
    gradient = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)[0]
    gradient.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in layer.parameters())
