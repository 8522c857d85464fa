"""The largest eigenvalue of a map's Jacobian, against dense ones and known ones."""

import pytest
import torch
from torch import nn

from implicit.diagnostics import spectral_radius
from solvers import solve
from solvers.testing.problems import linear, rotation

pytestmark = pytest.mark.usefixtures("double")


class TanhMap(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.a = nn.Linear(size, size)

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


def test_spectral_radius_is_exact_with_as_many_steps_as_entries():
    """Real and complex pairs of eigenvalues, of a nonlinear map, in a batch."""
    f, z, x = TanhMap(7), torch.randn(20, 7), torch.randn(20, 7)
    whole = torch.autograd.functional.jacobian(lambda z: f(z, x), z)
    eigenvalues = torch.linalg.eigvals(torch.stack([whole[i, :, i] for i in range(len(z))]))
    expected = eigenvalues.abs().max(dim=1).values
    found = spectral_radius(f, z, x, steps=50)
    assert torch.allclose(found.value, expected, rtol=1e-8)
    assert (found.residual < 1e-10).all()
    assert ((eigenvalues - found.eigenvalue.unsqueeze(1)).abs().min(dim=1).values < 1e-8).all()
    assert (found.eigenvalue.imag >= 0).all()
    assert found.eigenvalue.imag.any()


def test_spectral_radius_of_a_rotation():
    """Power iteration does not converge here: the largest eigenvalues are a complex pair."""
    problem = rotation(torch.float64)
    found = spectral_radius(problem.f, problem.z0)
    assert torch.allclose(found.value, torch.tensor(0.95))
    assert torch.allclose(found.eigenvalue.angle(), torch.tensor(1.0))
    assert (found.residual < 1e-10).all()


def test_spectral_radius_from_a_few_steps():
    """A known radius in 256 dimensions, and a residual that tells how good it is."""
    q = torch.linalg.qr(torch.randn(256, 256))[0]
    matrix = (q * torch.linspace(-0.5, 0.9, 256)) @ q.T
    few, more = (spectral_radius(lambda z: z @ matrix, torch.zeros(4, 256), steps=steps) for steps in (8, 40))
    for found in (few, more):
        assert ((found.value - 0.9).abs() <= found.residual * found.value).all()
    assert (more.value - 0.9).abs().max() < 0.005
    assert more.residual.max() < 0.03 < few.residual.min()


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
def test_spectral_radius_of_the_linear_problem(radius):
    problem = linear(torch.float32, radius=radius, batch=3)
    found = spectral_radius(problem.f, problem.z0, steps=80)
    assert torch.allclose(found.value.double(), torch.tensor(radius), rtol=1e-3)


def test_spectral_radius_is_the_rate_of_picard():
    f, x = TanhMap(8), 0.1 * torch.randn(3, 8)
    with torch.no_grad():
        f.a.weight.mul_(0.8 / torch.linalg.eigvals(f.a.weight).abs().max())
        z = solve(f, torch.zeros(3, 8), args=(x,), rtol=1e-14, atol=0, on_failure="ignore").value
        near = z + 1e-4 * torch.randn(3, 8)
        distances = []
        for _ in range(50):
            near = f(near, x)
            distances.append((near - z).norm(dim=1))
    rate = (distances[49] / distances[9]) ** (1 / 40)
    assert torch.allclose(rate, spectral_radius(f, z, x).value, rtol=0.02)


def test_pytrees_dtypes_and_modes():
    f, x = TanhMap(4).float(), torch.randn(6, 4, dtype=torch.float32)

    def split(z):
        first, second = f(torch.cat((z["a"], z["b"]), dim=1), x).split([1, 3], dim=1)
        return {"a": first, "b": second}

    expected = spectral_radius(f, x, x)
    assert expected.value.dtype == torch.float32
    assert expected.eigenvalue.dtype == torch.complex64
    assert not expected.value.requires_grad
    found = spectral_radius(split, {"a": x[:, :1], "b": x[:, 1:]})
    assert torch.allclose(found.value, expected.value, rtol=1e-4)
    found = spectral_radius(f, x.view(2, 3, 4), x.view(2, 3, 4), batch_dims=2)
    assert torch.allclose(found.value, expected.value.view(2, 3), rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spectral_radius(f, x, x)
    assert torch.allclose(found.value, expected.value, rtol=0.05)


class CountedProducts(torch.autograd.Function):
    """The identity, which counts its calls and the vector-Jacobian products through it."""

    calls = products = 0

    @staticmethod
    def forward(z):
        CountedProducts.calls += 1
        return z.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        CountedProducts.products += 1
        return cotangent


def test_one_call_of_the_map_and_a_product_for_each_step():
    CountedProducts.calls = CountedProducts.products = 0
    spectral_radius(lambda z: torch.sin(CountedProducts.apply(z)), torch.ones(2, 30), steps=7)
    assert (CountedProducts.calls, CountedProducts.products) == (1, 7)


def test_edges():
    zero = spectral_radius(lambda z: 0 * z, torch.ones(2, 3))
    assert torch.equal(zero.value, torch.zeros(2))
    assert torch.equal(zero.residual, torch.zeros(2))
    found = spectral_radius(torch.sin, torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]))
    assert torch.allclose(found.value[0], torch.tensor(1.0).cos())
    assert found.value[1].isnan()
    assert found.residual[1].isnan()
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        spectral_radius(torch.sin, torch.ones(2, 3), steps=0)


@pytest.mark.gpu
def test_on_the_gpu():
    f, z = TanhMap(7).cuda(), torch.randn(5, 7, device="cuda")
    found = spectral_radius(f, z, z, steps=7)
    expected = spectral_radius(f.cpu(), z.cpu(), z.cpu(), steps=7)
    assert torch.allclose(found.value.cpu(), expected.value)
