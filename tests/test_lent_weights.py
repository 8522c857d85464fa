"""``torch.func.functional_call`` of a layer in plain autograd: every lent tensor gets its gradient, leaf or not."""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations

from implicit import SHINE, Checkpointed, FixedPointLayer, Implicit, Phantom, fixed_point, spectral_norm

pytestmark = pytest.mark.usefixtures("double")

TIGHT = {"rtol": 1e-14, "max_steps": 300, "on_failure": "ignore"}
FIXED = {"rtol": None, "atol": None, "max_steps": 50}
MODES = {
    "implicit": (Implicit(), TIGHT),
    "shine": (SHINE(max_residual=0.0), TIGHT),
    "phantom": (Phantom(steps=50), TIGHT),
    "checkpointed": (Checkpointed(), FIXED),
    "unrolled": ("unrolled", FIXED),
    "auto": ("auto", FIXED),
}


class Cell(nn.Module):
    def __init__(self, normalize=lambda linear: linear):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        normalize(self.linear)
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, z, x):
        return self.scale * torch.tanh(self.linear(z)) + x


def helper(cell, z, x):
    return cell(z, x)


class Owner(nn.Module):
    """A layer whose map is no module, but reaches one."""

    def __init__(self, cell, wrap, **options):
        super().__init__()
        self.cell = cell
        self.f = wrap(cell)
        self.options = options

    def forward(self, x):
        return fixed_point(self.f, torch.zeros_like(x), x, **self.options)


NORMALIZED = {
    "plain": lambda linear: linear,
    "spectral": functools.partial(spectral_norm, coeff=0.3),
    "weight": parametrizations.weight_norm,
}
REACHED = {
    "layer": lambda cell, **options: FixedPointLayer(cell, **options),
    "lambda": lambda cell, **options: Owner(cell, lambda cell: lambda z, x: helper(cell, z, x), **options),
    "dict": lambda cell, **options: Owner(
        cell, lambda cell: lambda z, x, parts=({"a": cell},): parts[0]["a"](z, x), **options
    ),
}


def iterated(layer, fast, x, steps=50):
    """The limit, as plain autograd differentiates it, from weights that are computed once."""
    cell = layer.f if isinstance(layer, FixedPointLayer) else layer.cell
    prefix = "f." if isinstance(layer, FixedPointLayer) else "cell."
    lent = {name.removeprefix(prefix): w for name, w in fast.items()}

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            weight = cell.linear.weight
            z = torch.zeros_like(x)
            for _ in range(steps):
                z = cell.scale * torch.tanh(nn.functional.linear(z, weight, cell.linear.bias)) + x
            return z

    return functional_call(Once(), {f"cell.{name}": w for name, w in lent.items()}, (x,))


def loss_of(z):
    return z.sin().sum()


@pytest.mark.parametrize("normalized", NORMALIZED)
@pytest.mark.parametrize("reached", REACHED)
@pytest.mark.parametrize("mode", MODES)
def test_fast_weights(mode, reached, normalized):
    """Gradients of the fast weights, of the leaves behind them, and of the inputs."""
    backward, options = MODES[mode]
    layer = REACHED[reached](Cell(NORMALIZED[normalized]), solver="broyden", backward=backward, **options).eval()
    x = torch.randn(4, 3, requires_grad=True)
    leaves = dict(layer.named_parameters())
    fast = {name: p - 0.1 * p.sin() for name, p in leaves.items()}
    sources = [x, *fast.values(), *leaves.values()]
    with torch.no_grad():
        unlent = layer(x)
    found = torch.autograd.grad(loss_of(functional_call(layer, fast, (x,))), sources, retain_graph=True)
    expected = torch.autograd.grad(loss_of(iterated(layer, fast, x)), sources)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(layer(x), unlent)


@pytest.mark.parametrize("lent", ["leaf", "parameter", "some"])
@pytest.mark.parametrize("mode", MODES)
def test_leaves_that_are_lent(mode, lent):
    backward, options = MODES[mode]
    layer = FixedPointLayer(Cell(), solver="broyden", backward=backward, **options)
    x = torch.randn(4, 3)
    fast = {name: (0.8 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    if lent == "parameter":
        fast = {name: nn.Parameter(p) for name, p in fast.items()}
    if lent == "some":
        del fast["f.scale"]
    every = {**dict(layer.named_parameters()), **fast}
    found = torch.autograd.grad(loss_of(functional_call(layer, fast, (x,))), list(every.values()))
    expected = torch.autograd.grad(loss_of(iterated(layer, every, x)), list(every.values()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("normalized", ["plain", "spectral"])
@pytest.mark.parametrize("reached", ["layer", "dict"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("shine", "auto")])
def test_a_step_of_maml(mode, reached, normalized):
    """The outer gradient goes through inner steps, so the layer is differentiated twice."""
    backward, options = MODES[mode]
    layer = REACHED[reached](Cell(NORMALIZED[normalized]), solver="broyden", backward=backward, **options).eval()
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    leaves = dict(layer.named_parameters())

    def outer(call):
        fast = leaves
        for _ in range(2):
            gradients = torch.autograd.grad(call(fast, x).sin().sum(), list(fast.values()), create_graph=True)
            fast = {name: w - 0.1 * g for (name, w), g in zip(fast.items(), gradients, strict=True)}
        return torch.autograd.grad(loss_of(call(fast, y)), list(leaves.values()))

    found = outer(lambda fast, x: functional_call(layer, fast, (x,)))
    expected = outer(lambda fast, x: iterated(layer, fast, x))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["implicit", "phantom", "unrolled", "shine"])
@pytest.mark.parametrize("reached", REACHED)
@pytest.mark.parametrize("normalized", NORMALIZED)
def test_under_a_transform(normalized, reached, mode):
    backward, options = MODES[mode]
    layer = REACHED[reached](Cell(NORMALIZED[normalized]), solver="broyden", backward=backward, **options).eval()
    x = torch.randn(4, 3)
    weights = {name: 0.9 * p.detach() for name, p in layer.named_parameters()}
    found = grad(lambda w: loss_of(functional_call(layer, w, (x,))))(weights)
    expected = grad(lambda w: loss_of(iterated(layer, w, x)))(weights)
    for name in weights:
        assert torch.allclose(found[name], expected[name], rtol=1e-8, atol=1e-10)


def test_results_that_a_map_closes_over():
    """They get their own gradient, also where their history is used, and let go of, elsewhere."""
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y, scale = 0.3 * w.tanh(), (0.5 * x).sin()
    parts = {"y": [y]}
    z = fixed_point(lambda z: torch.tanh(z @ parts["y"][0].T) + scale, torch.zeros(4, 3), **TIGHT)
    loss = loss_of(z) + y.sum() + scale.sum()
    expected = torch.zeros(4, 3)
    for _ in range(120):
        expected = torch.tanh(expected @ y.T) + scale
    expected = loss_of(expected) + y.sum() + scale.sum()
    for a, b in zip(
        torch.autograd.grad(loss, (y, scale, w, x), retain_graph=True),
        torch.autograd.grad(expected, (y, scale, w, x), retain_graph=True),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    loss.backward()  # frees what is behind y and scale, in some order
    assert w.grad is not None


@pytest.mark.parametrize("order", [1, 2])
def test_results_and_what_they_are_made_of_both_closed_over(order):
    w = (0.3 * torch.randn(3, 3)).requires_grad_()
    y = w.sin()
    v = y.cos() * 0.2

    def f(z):
        return torch.tanh(z @ (w + y).T) + v

    def derivative(z):
        found = torch.autograd.grad(loss_of(z), w, create_graph=True)[0]
        return found if order == 1 else torch.autograd.grad(found.square().sum(), w)[0]

    z = torch.zeros(3, 3)
    for _ in range(120):
        z = f(z)
    assert torch.allclose(derivative(fixed_point(f, torch.zeros(3, 3), **TIGHT)), derivative(z), rtol=1e-8)
