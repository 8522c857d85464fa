"""Gradients through the steps, and how they depend on the start."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from solvers import Anderson, Broyden, Picard, Squarem, solve

SOLVERS = [
    Picard(),
    *(Anderson(memory=m, least_squares=how) for m in range(1, 6) for how in ("gram", "qr")),
    Anderson(damping=0.7),
    Broyden(),
    Broyden(memory=3),
    Broyden(method="bad"),
    Squarem(),
]


def problem(seed, batch=2, size=3):
    """``z -> tanh(z A^T) / 2 + x / 2``, its fixed points and the derivative of their sum to x."""
    generator = torch.Generator().manual_seed(seed)
    a, x = (torch.randn(n, size, dtype=torch.float64, generator=generator) for n in (size, batch))
    a = a / torch.linalg.matrix_norm(a, 2)

    def f(z, x):
        return 0.5 * torch.tanh(z @ a.T.to(z)) + 0.5 * x

    z = torch.zeros_like(x)
    for _ in range(200):
        z = f(z, x)
    slope = 0.5 * (1 - torch.tanh(z @ a.T) ** 2)  # (B, D)
    system = torch.eye(size, dtype=torch.float64) - slope.unsqueeze(2) * a
    expected = 0.5 * torch.linalg.solve(system.mT, torch.ones(batch, size, 1, dtype=torch.float64)).squeeze(2)
    return f, x, z, expected


def gradient(f, x, z0, solver, **options):
    x = x.clone().requires_grad_()
    value = solve(lambda z: f(z, x), z0, solver, atol=options.pop("atol", 0), on_failure="ignore", **options).value
    return torch.autograd.grad(value.sum(), x)[0]


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.sampled_from(SOLVERS), st.integers(0, 1000), st.floats(-2, 2))
def test_solves_to_a_tolerance_have_the_implicit_gradient(solver, seed, size):
    """From starts of which no entry is solved."""
    f, x, z, expected = problem(seed)
    z0 = z + 10**size * torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(gradient(f, x, z0, solver, rtol=1e-12, max_steps=200), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_solved_start_has_the_derivative_of_its_image(solver):
    f, x, z, _ = problem(0)
    near, of_image = z * (1 + 1e-10), torch.full_like(x, 0.5)
    one_near = torch.stack((z[0] + 1, near[1]))
    for z0 in (near, one_near):
        value = solve(lambda z: f(z, x), z0, solver, rtol=1e-6, atol=0).value
        assert torch.equal(value[1], near[1])
        assert torch.equal(gradient(f, x, z0, solver, rtol=1e-6)[1], of_image[1])
    value, tangent = torch.func.jvp(
        lambda x: solve(lambda z: f(z, x), near, solver, rtol=1e-6, atol=0).value, (x,), (of_image,)
    )
    assert torch.equal(value, near)
    assert torch.equal(tangent, of_image / 2)


@pytest.mark.long
@hypothesis.settings(max_examples=100)
@hypothesis.given(st.sampled_from(SOLVERS), st.integers(0, 1000), st.sampled_from(["entry", "sample", "all"]))
def test_enough_steps_have_the_implicit_gradient_from_any_start(solver, seed, solved):
    """The value needs few steps where the start is solved; the gradient needs those of a contraction by 1/2."""
    f, x, z, expected = problem(seed)
    z0 = torch.zeros_like(z)
    rows = {"entry": (0, 1), "sample": 0, "all": slice(None)}[solved]
    z0[rows] = z[rows]
    found = gradient(f, x, z0, solver, rtol=None, atol=None, max_steps=160)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_gradients_from_a_solved_start_are_those_of_the_steps_taken(solver):
    """What ``Solver.differentiable`` warns of: one step is taken, and its derivative is that of f alone."""
    f, x, z, expected = problem(0)
    found = gradient(f, x, z, solver, rtol=1e-12, max_steps=200)
    assert torch.allclose(found, torch.full_like(x, 0.5))
    assert not torch.allclose(found, expected, rtol=0.01)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_steps_after_convergence_leave_the_derivatives_as_they_are(solver, size, dtype):
    """Differences of rounding errors tell nothing; of many samples, there are some in which they are dependent."""
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    f, x, z, expected = problem(0, batch=500, size=size)
    x, z0 = x.to(dtype), torch.zeros_like(z, dtype=dtype)
    for steps in (30, 60):
        found = gradient(f, x, z0, solver, rtol=None, atol=None, max_steps=steps)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)

    def value(x):
        return solve(lambda z: f(z, x), z0, solver, rtol=None, atol=None, max_steps=40).value

    tangent = torch.func.jvp(value, (x,), (torch.ones_like(x),))[1]
    # Differentiated, z = f(z, x) says so.
    of_image = torch.func.jvp(f, (z.to(dtype), x), (tangent, torch.ones_like(x)))[1]
    torch.testing.assert_close(tangent, of_image, rtol=0, atol=10 * tolerance)
