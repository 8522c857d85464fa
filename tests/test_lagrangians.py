"""Lagrangians: their closed forms against automatic differentiation, and the points where formulas break down."""

import math

import pytest
import torch
from torch.nn import functional as F

from imixer.hopfield import GELU, CentredNorm, Identity, ReLU, Softmax

LAGRANGIANS = {
    "identity": Identity(),
    "relu": ReLU(),
    "softmax": Softmax(beta=2.5),
    "gelu": GELU(),
    "centred norm": CentredNorm(),
}
every_lagrangian = pytest.mark.parametrize("lagrangian", LAGRANGIANS.values(), ids=LAGRANGIANS.keys())

pytestmark = pytest.mark.usefixtures("double")


@every_lagrangian
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 1, 6)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_derivatives_are_those_of_automatic_differentiation(lagrangian, shape, scale):
    x = (scale * torch.randn(shape)).requires_grad_()
    direction = torch.randn(shape)
    value = lagrangian.value(x)
    assert value.shape == shape[:-1]
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert torch.allclose(lagrangian.activation(x), gradient, rtol=1e-12, atol=1e-14)
    product = lagrangian.hvp(x, direction)
    assert product.shape == shape
    # The Hessian is the derivative of the activation; where it is large, so is the rounding of what cancels in it.
    (expected,) = torch.autograd.grad(lagrangian.activation(x), x, direction, retain_graph=True)
    assert torch.allclose(product, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@every_lagrangian
def test_convex_where_it_says_so(lagrangian):
    def smallest_eigenvalue(x):
        return torch.linalg.eigvalsh(torch.func.jacrev(lagrangian.activation)(x))[0]

    smallest = torch.func.vmap(smallest_eigenvalue)(2 * torch.randn(200, 5)).min()
    assert (smallest >= -1e-12) == lagrangian.convex


def test_slopes_of_gelu():
    """Between -0.1289 and 1.1289, at minus and plus the root of 2; 0 at -0.7518."""
    x = torch.linspace(-10, 10, 200_001)
    slope = GELU().hvp(x, torch.ones_like(x))
    root = torch.tensor(math.sqrt(2))
    assert slope.max().item() == pytest.approx(GELU().hvp(root, torch.tensor(1.0)).item(), abs=1e-9)
    assert slope.max().item() == pytest.approx(1.128904, abs=1e-6)
    assert slope.min().item() == pytest.approx(1 - 1.128904, abs=1e-6)
    assert (slope[x < -0.752] < 0).all()
    assert (slope[x > -0.751] > 0).all()


def test_large_values_do_not_overflow():
    x = torch.tensor([-1e200, -1e3, -40.0, 1e3, 1e150]).unsqueeze(-1)
    expected = torch.tensor([0.0, 0.0, 0.0, 1e6 / 2 - 0.5, 1e300 / 2])
    assert torch.allclose(GELU().value(x), expected)
    assert torch.equal(GELU().hvp(x, torch.ones_like(x)).flatten(), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    softmax = Softmax(beta=100.0)
    x = torch.tensor([1e5, 1e5, -1e5])
    assert softmax.value(x).item() == pytest.approx(1e5 + math.log(2) / 100, rel=1e-15)
    assert torch.equal(softmax.activation(x), torch.tensor([0.5, 0.5, 0.0]))
    assert torch.equal(softmax.hvp(x, torch.tensor([1.0, 0.0, 0.0])), torch.tensor([25.0, -25.0, 0.0]))


@pytest.mark.parametrize("number", [0.0, 0.1, 1e8], ids=str)
def test_centred_norm_of_equal_numbers(number):
    """0.1 seven times has a mean that is not rounded to 0.1, which must not be taken for a direction."""
    x = torch.full((2, 7), number, requires_grad=True)
    norm = CentredNorm()
    assert torch.equal(norm.value(x), torch.zeros(2))
    assert torch.equal(norm.activation(x), torch.zeros(2, 7))
    assert torch.equal(norm.hvp(x, torch.randn(2, 7)), torch.zeros(2, 7))
    for output in (norm.value(x), norm.activation(x)):
        (gradient,) = torch.autograd.grad(output.sum(), x)
        assert torch.equal(gradient, torch.zeros(2, 7))


def test_centred_norm_of_almost_equal_numbers():
    deviation = 2.0**-40 * torch.tensor([1.0, -3.0, 2.0, 0.0])
    assert torch.allclose(CentredNorm().activation(1 + deviation), F.normalize(deviation, dim=0), rtol=1e-14)


def test_centred_norm_is_layer_norm_and_homogeneous():
    x = torch.randn(5, 8)
    norm = CentredNorm()
    assert torch.allclose(norm.activation(x), F.layer_norm(x, (8,), eps=0.0) / math.sqrt(8))
    assert torch.allclose(norm.hvp(x, x), torch.zeros(5, 8), atol=1e-15)
    assert torch.allclose((x * norm.activation(x)).sum(-1), norm.value(x))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_inverse_temperature_is_positive(beta):
    with pytest.raises(ValueError, match=f"an inverse temperature, must be > 0, got {beta}"):
        Softmax(beta=beta)
