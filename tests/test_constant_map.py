"""Parametrized weights are constant during a solve; autocast and half precision."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations

from implicit import SHINE, FixedPointLayer, Implicit, spectral_norm
from solvers import solve
from solvers.linear import GMRES

all_backwards = pytest.mark.parametrize(
    "backward", ["unrolled", "checkpointed", "implicit", "phantom", "jfb", "neumann", "shine", "auto"]
)
TIGHT = {"rtol": 1e-14, "atol": 1e-14, "max_steps": 200, "on_failure": "ignore"}


class TanhMap(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.a = nn.Linear(size, size)
        with torch.no_grad():
            self.a.weight.mul_(0.6 / torch.linalg.matrix_norm(self.a.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


class Normalized(nn.Module):
    """A map with a parametrized weight that changes at every access in training mode."""

    def __init__(self, parametrize):
        super().__init__()
        self.linear = parametrize(nn.Linear(4, 4))
        self.used = []

    def forward(self, z, x):
        weight = self.linear.weight
        self.used.append(weight.detach().clone())
        return torch.tanh(nn.functional.linear(z, 0.9 * weight, self.linear.bias) + x)


@pytest.mark.parametrize(
    "parametrize", [lambda m: spectral_norm(m, n_power_iterations=1), parametrizations.spectral_norm]
)
@all_backwards
def test_parametrized_weights_are_constant_during_a_solve(backward, parametrize):
    options = {"solver": "broyden", "rtol": 1e-5, "max_steps": 200}
    layer = FixedPointLayer(Normalized(parametrize), backward=backward, **options)
    # A weight that is far from what the power iteration was settled on.
    with torch.no_grad():
        layer.f.linear.parametrizations.weight.original.copy_(torch.randn(4, 4))
    x = torch.randn(6, 4, requires_grad=True)
    for wrap in (lambda: layer(x), lambda: torch.no_grad()(layer)(x)):
        layer.f.used.clear()
        z = wrap()
        if z.requires_grad:
            z.sum().backward()
        assert len(layer.f.used) > 3
        assert all(torch.equal(weight, layer.f.used[0]) for weight in layer.f.used)
    assert layer.f.linear.parametrizations.weight.original.grad.abs().sum() > 0


def test_parametrized_weights_get_exact_gradients():
    f = Normalized(spectral_norm).double().eval()
    with torch.no_grad():
        f.linear.parametrizations.weight.original.mul_(5)
        f.linear.parametrizations.weight[0].settle(f.linear.parametrizations.weight.original)
    layer = FixedPointLayer(f, backward=Implicit(linear_solver=GMRES(rtol=1e-13)), **TIGHT).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = grad(lambda p: functional_call(layer, p, (x.detach(),)).sin().sum())(parameters)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-8)


@all_backwards
def test_autocast(backward):
    if backward == "shine":  # whose estimate, if it stays one, is another after other steps
        backward = SHINE(max_residual=1e-2)
    layer = FixedPointLayer(TanhMap(16), solver="broyden", backward=backward, rtol=1e-2)
    x = torch.randn(32, 16)

    def gradients(enabled):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = layer(x)
            assert z.dtype == torch.float32
            loss = z.square().sum()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.backward()
        return torch.cat([p.grad.flatten() for p in layer.parameters()])

    exact = gradients(False)
    assert (gradients(True) - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov"])
def test_the_algebra_is_float32_under_autocast(solver):
    """f runs in bfloat16; what the solver computes from its results does not."""
    seen = []

    def f(z, x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(z @ weight) + x

    weight, x = torch.randn(16, 16) / 8, torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = solve(f, x, solver, args=(x,), rtol=None, atol=None, max_steps=5).state
        # Exact products of what was stored: rounded to bfloat16 they would be off by a part in a hundred.
        if solver == "anderson":
            dg = state.dg[:, : state.gram.shape[1]].double()
            assert torch.allclose(state.gram.double(), dg @ dg.transpose(1, 2), rtol=1e-4, atol=1e-9)
        assert torch.is_autocast_enabled("cpu")
    assert all(seen)
    assert state.z.dtype == state.fz.dtype == torch.float32


def test_half_precision_layer():
    layer = FixedPointLayer(TanhMap(3).bfloat16(), rtol=2e-2, backward=Implicit(linear_solver=GMRES(rtol=2e-2)))
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.dtype == x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
