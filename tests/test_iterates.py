"""Intermediate iterates with one-step gradients, and losses on them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from implicit import FixedPointLayer, iterates, spectral_norm
from solvers import Anderson, Broyden, Picard, solve

pytestmark = pytest.mark.usefixtures("double")


class TanhMap(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.a = nn.Linear(size, size)
        with torch.no_grad():
            self.a.weight.mul_(0.8 / torch.linalg.matrix_norm(self.a.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("tolerance", [{"rtol": None, "atol": None}, {"rtol": 1e-10}], ids=["fixed", "tested"])
def test_values_and_gradients_are_those_of_one_step(solver, tolerance):
    """From what the solver has after so many steps, by the formula."""
    f, x, cotangent = TanhMap(), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    layer = FixedPointLayer(f, solver=solver, max_steps=100, **tolerance)
    wanted = (x, *f.parameters())
    for k, z in zip((1, 2, 5), layer.iterates(x, steps=(1, 2, 5)), strict=True):
        with torch.no_grad():
            before = solve(f, torch.zeros(3, 4), solver, args=(x,), max_steps=k, on_failure="ignore", **tolerance).value
            returned = layer(x, max_steps=k) if tolerance["rtol"] is None else before
        expected = f(before, x)
        assert torch.equal(z, expected)
        assert torch.equal(returned, before)
        found = torch.autograd.grad(z, wanted, cotangent)
        for a, b in zip(found, torch.autograd.grad(expected, wanted, cotangent), strict=True):
            assert torch.equal(a, b)


def test_calls_of_the_map():
    """One solve for all, and one call with a gradient for each."""
    calls = []

    def f(z, x):
        calls.append(torch.is_grad_enabled())
        return 0.9 * torch.sin(z) + x

    x = torch.ones(2, 3, requires_grad=True)
    iterates(f, torch.zeros(2, 3), x, steps=(2, 3, 7), solver="picard", rtol=1e-12)
    assert (calls.count(False), calls.count(True)) == (7, 3)
    calls.clear()
    z = iterates(f, torch.zeros(2, 3), x, steps=(2, 100, 200), solver="anderson", rtol=1e-6)
    assert calls.count(True) == 2
    assert z[1] is z[2]


def test_pytrees_and_start():
    def f(z, x):
        return {"a": 0.5 * torch.cos(z["b"]), "b": 0.3 * z["a"] + x}

    x = torch.randn(3, 2, requires_grad=True)
    start = {"a": torch.ones(3, 2), "b": torch.zeros(3, 2)}
    layer = FixedPointLayer(f, solver="picard", init=lambda x: start, rtol=None, atol=None)
    (z,) = layer.iterates(x, steps=(1,))
    expected = f(f(start, x), x)
    assert torch.equal(z["a"], expected["a"])
    assert torch.equal(z["b"], expected["b"])
    (gradient,) = torch.autograd.grad(z["b"].sum(), x)
    assert torch.equal(gradient, torch.ones(3, 2))
    (warm,) = layer.iterates(x, steps=(1,), z0=z)
    assert torch.equal(warm["a"], f(f(z, x), x)["a"])


def test_transforms_autocast_and_no_grad():
    layer, x = FixedPointLayer(TanhMap(), rtol=1e-10), torch.randn(3, 4)

    def loss(parameters):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return sum(z.square().sum() for z in self.layer.iterates(x, steps=(2, 4)))

        return functional_call(Model(), parameters, (x,))

    parameters = {f"layer.{name}": p.detach() for name, p in layer.named_parameters()}
    found = grad(loss)(parameters)
    sum(z.square().sum() for z in layer.iterates(x, steps=(2, 4))).backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(found[f"layer.{name}"], parameter.grad)
    with torch.no_grad():
        assert not layer.iterates(x, steps=(2,))[0].requires_grad
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (z,) = layer.iterates(x, steps=(3,))
    assert z.dtype == torch.float32


def test_parametrized_weights_are_computed_once():
    linear = spectral_norm(nn.Linear(4, 4), n_power_iterations=1)
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(torch.randn(4, 4))
    used = []

    def f(z, x):
        used.append(linear.weight)
        return torch.tanh(linear(z) + x)

    z = iterates(f, torch.zeros(3, 4), torch.randn(3, 4), steps=(1, 4), rtol=None, atol=None)
    assert all(torch.equal(weight, used[0]) for weight in used)
    z[1].sum().backward()
    assert linear.parametrizations.weight.original.grad.abs().sum() > 0


def train(correction, seed):
    """The losses of the first iterates of a layer that was trained with and without a loss on them."""
    torch.manual_seed(seed)
    x = torch.randn(128, 4)
    target = torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin()), dim=1)
    f, head = TanhMap(16), nn.Linear(16, 2)
    embed = nn.Linear(4, 16)
    layer = FixedPointLayer(f, solver="picard", on_failure="ignore", max_steps=60)
    optimizer = torch.optim.Adam([*f.parameters(), *head.parameters(), *embed.parameters()], lr=0.01)
    for _ in range(80):
        y = embed(x)
        zs = layer.iterates(y, steps=(1, 3)) if correction else []
        zs.append(layer(y, z0=zs[-1] if zs else None))
        losses = [(head(z) - target).square().mean() for z in zs]
        loss = sum(0.8 ** (len(losses) - 1 - i) * value for i, value in enumerate(losses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        y = embed(x)
        return [(head(z) - target).square().mean().item() for z in (*layer.iterates(y, steps=(1, 3)), layer(y))]


@pytest.mark.long
def test_a_loss_on_iterates_makes_early_ones_better():
    without, with_ = train(correction=False, seed=0), train(correction=True, seed=0)
    assert with_[0] < 0.8 * without[0]
    assert with_[2] < 1.3 * without[2]


def test_refusals():
    for steps in ((), (0,), (2, 2), (3, 1), (1.5,)):
        with pytest.raises(ValueError, match="steps must be increasing positive integers, got"):
            iterates(torch.cos, torch.ones(2, 1), steps=steps)
    with pytest.raises(ValueError, match="must return the shape of the state"):
        iterates(lambda z: z[:, :1], torch.ones(2, 3), steps=(1,))
