"""The classical systems: values at the starts worked out by hand, the known roots, and independent rows."""

import math

import pytest
import torch

from solvers.testing import NONLINEAR


def test_there_are_twenty_three():
    assert len(NONLINEAR) == 23
    for problem in NONLINEAR.values():
        assert problem.x0.dtype == torch.float64
        assert problem.x0.shape[0] == 1


# Worked out by hand from the formulas of the literature.
AT_THE_START = {
    "Generalized Rosenbrock": [2.2, -4.4, *[0.0] * 8],
    "Powell singular": [-7.0, -math.sqrt(5), 1.0, 4 * math.sqrt(10)],
    "Powell badly scaled": [-1.0, math.exp(-1) - 1e-4],
    # x2 - x1^2 = x4 - x3^2 = -10
    "Wood": [-6000 - 4, -2000 - 40.4 - 39.6, -5400 - 4, -1800 - 40.4 - 39.6],
    "Helical valley": [-50.0, 0.0, 0.0],
    # The sums over t of -1 / t and of -2, and what x2^2 + 1 adds.
    "Watson": [-29 * sum(1 / i for i in range(1, 30)), -2 * 29 - 1],
    "Chebyquad": [1 / 3, (-1 - 1 / 9) / 2 + 1 / 3],
    "Brown almost linear": [*[0.5 + 5 - 11] * 9, 2**-10 - 1],
    "Variably dimensioned": [-0.1 * k + k * -38.5 * (1 + 2 * 38.5**2) for k in range(1, 11)],
    "Broyden tridiagonal": [-2.0, *[-1.0] * 8, -3.0],
    "Broyden banded": [-6.0] * 10,
    "Hammarling 2 by 2": [1 - 1e-4, -1.0, 0.0, 1 - 1e-4],
    "Hammarling 3 by 3": [1 - 1e-4, -1.0, 0.0, 0.0, 1 - 1e-4, 0.0, 0.0, 0.0, 1 - 1e-4],
    "Dennis and Schnabel": [3.0, 17.0],
    "Sample 18": [2 * (1 - math.exp(-4)), 1 - math.exp(-4)],
    "Sample 19": [54.0, 54.0],
    "x (x - 5)^2": [16.0],
    "Freudenstein-Roth": [0.5 - 13 + (5 + 2) * 4 + 4, 0.5 - 29 - 8 + 4 + 28],
    "Boggs": [2.0, 0.0],
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_value_at_the_start(name):
    problem = NONLINEAR[name]
    expected = torch.tensor([AT_THE_START[name]], dtype=torch.float64)
    assert torch.allclose(problem.F(problem.x0), expected, rtol=1e-12, atol=1e-14)


def test_sums_written_out():
    """Where the start tells little: entries at some point, summed term by term."""
    x = torch.linspace(-1, 2, 10, dtype=torch.float64)
    values = {name: NONLINEAR[name].F(x.unsqueeze(0))[0] for name in NONLINEAR if NONLINEAR[name].x0.shape[1] == 10}
    z, h = x.tolist(), 1 / 11
    cubes = [(z[j] + (j + 1) * h + 1) ** 3 for j in range(10)]
    k = 3  # counted from 0
    boundary = 2 * z[k] - z[k - 1] - z[k + 1] + h * h / 2 * cubes[k]
    assert math.isclose(values["Discrete boundary value"][k], boundary)
    below = sum((j + 1) * h * cubes[j] for j in range(k + 1))
    above = sum((1 - (j + 1) * h) * cubes[j] for j in range(k, 10))
    integral = z[k] + h / 2 * ((1 - (k + 1) * h) * below + (k + 1) * h * above)
    assert math.isclose(values["Discrete integral equation"][k], integral)
    trigonometric = 10 - sum(map(math.cos, z)) + (k + 1) * (1 - math.cos(z[k])) - math.sin(z[k])
    assert math.isclose(values["Trigonometric"][k], trigonometric)
    kernel = sum(0.9 / 20 * (k + 1) / (k + 1 + j + 1) * z[j] for j in range(10))
    assert math.isclose(values["Chandrasekhar"][k], z[k] - 1 / (1 - kernel))
    for k in (1, 8):
        banded = sum(z[j] * (1 + z[j]) for j in range(max(0, k - 5), min(9, k + 1) + 1) if j != k)
        assert math.isclose(values["Broyden banded"][k], z[k] * (2 + 5 * z[k] ** 2) + 1 - banded)


@pytest.mark.parametrize("name", [name for name, problem in NONLINEAR.items() if problem.roots is not None])
def test_known_roots(name):
    problem = NONLINEAR[name]
    assert problem.F(problem.roots).abs().max() < 1e-12
    assert problem.F(problem.roots + 0.1).abs().max() > 1e-4
    for f in (problem.minus, problem.plus):
        assert torch.allclose(f(problem.roots), problem.roots, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NONLINEAR)
def test_rows_do_not_depend_on_each_other(name):
    problem = NONLINEAR[name]
    generator = torch.Generator().manual_seed(0)
    x = problem.x0 + torch.rand(3, problem.x0.shape[1], dtype=torch.float64, generator=generator)
    together = problem.F(x)
    assert together.shape == x.shape
    assert torch.allclose(torch.cat([problem.F(row) for row in x.split(1)]), together, rtol=1e-12, atol=1e-12)
    assert torch.equal(problem.minus(x), x - together)
    assert torch.equal(problem.plus(x), x + together)


def test_the_angle_of_the_helical_valley_goes_all_round():
    """From -1/4 just below the negative axis of b to 3/4 on its other side."""
    angles = torch.tensor([-89.9, -45, 0, 60, 90, 120, 180, 200, 269.9], dtype=torch.float64)
    radians = angles.deg2rad()
    x = torch.stack((radians.cos(), radians.sin(), 0 * angles), dim=1)
    values = NONLINEAR["Helical valley"].F(x)
    assert torch.allclose(values[:, 0], -100 * angles / 360, atol=1e-9)
    assert torch.allclose(values[:, 1:], torch.zeros(len(x), 2, dtype=torch.float64), atol=1e-14)
    top = torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert NONLINEAR["Helical valley"].F(top)[:, 0].tolist() == [-25.0, 25.0, 0.0]


def test_removable_singularities_have_derivatives():
    """Sample 18 at its axes: h(u) = u + O(u^3)."""
    x = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    jacobian = torch.func.jacfwd(NONLINEAR["Sample 18"].F)(x)[0, :, 0]
    expected = torch.tensor([[9.0, 0.0], [(1 - math.exp(-9)) / 3, 0.0]], dtype=torch.float64)
    assert torch.allclose(jacobian, expected)


def test_singular_jacobians():
    """Powell's singular function has rank 2 at its root, sample 19 rank 0, x (x - 5)^2 rank 0 at its double root."""
    for name, rank in {"Powell singular": 2, "Sample 19": 0, "x (x - 5)^2": 0}.items():
        problem = NONLINEAR[name]
        root = problem.roots[-1:]
        jacobian = torch.func.jacfwd(problem.F)(root)[0, :, 0]
        assert torch.linalg.matrix_rank(jacobian) == rank
