"""Newton-Krylov on the problem bank, where Picard converges and where it cannot."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit import fixed_point
from solvers import Newton, NewtonKrylov, Status, solve
from solvers.linear import GMRES, BiCGStab
from solvers.testing import BANK

PROBLEMS = ["linear 0.5", "linear 0.9", "linear 0.99", "rotation", "planes", "cos", "cos, marginal", "tanh", "mixed"]
PROBLEMS += ["expansive", "H-equation", "contractive 2x2", "alex"]
SOLVERS = [NewtonKrylov(), NewtonKrylov(forcing=0.01), NewtonKrylov(linear_solver=BiCGStab(max_steps=40))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS, ids=["eisenstat-walker", "forcing", "bicgstab"])
def test_finds_the_fixed_point(solver, problem, dtype):
    bank = BANK[problem](dtype)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return bank.f(z)

    solution = solve(f, bank.z0, solver, rtol=rtol, atol=0, on_failure="raise")
    assert calls == solution.num_evals
    assert int(solution.num_steps.max()) <= 8
    # The error is a residual times the condition of I - J, 100 or so on linear 0.99.
    error = (solution.value - bank.solution).norm() / bank.solution.norm()
    assert error < 200 * rtol


def test_a_linear_map_takes_one_step():
    bank = BANK["expansive"](torch.float64)
    solution = solve(bank.f, bank.z0, NewtonKrylov(forcing=1e-12), rtol=1e-10, atol=0, on_failure="raise")
    assert solution.num_steps.tolist() == [2] * 4  # the first is the evaluation at the start
    assert torch.allclose(solution.value, bank.solution, rtol=1e-8)


def test_converges_quadratically():
    # z = z - (z^2 - 2): Newton's method for the square root of 2.
    history = solve(
        lambda z: z - (z * z - 2),
        torch.full((1, 1), 2.0, dtype=torch.float64),
        NewtonKrylov(forcing=1e-12),
        rtol=1e-14,
        atol=0,
        history=True,
    ).history.flatten()
    assert len(history) <= 6
    assert history[3] < history[2] ** 1.8
    assert history[4] < history[3] ** 1.8


def test_backtracking_saves_a_step_that_is_too_long():
    """On z = z - atan(z) full Newton steps diverge from |z| > 1.39; each sample shortens its own."""
    z0 = torch.tensor([[0.5], [3.0], [20.0]], dtype=torch.float64)
    solution = solve(lambda z: z - torch.atan(z), z0, NewtonKrylov(), rtol=0, atol=1e-10, on_failure="raise")
    assert (solution.value.abs() < 1e-9).all()
    alone = solve(lambda z: z - torch.atan(z), z0[:1], NewtonKrylov(), rtol=0, atol=1e-10)
    assert torch.equal(alone.value[0], solution.value[0])
    assert alone.num_steps[0] == solution.num_steps[0]


def test_a_nan_sample_leaves_the_others_exact():
    bank = BANK["expansive"](torch.float64)
    poison = torch.zeros(4, 1, dtype=torch.float64)
    poison[2] = torch.nan
    solution = solve(lambda z: bank.f(z) + poison, bank.z0, NewtonKrylov(), rtol=1e-10, atol=0, on_failure="ignore")
    expected = solve(bank.f, bank.z0, NewtonKrylov(), rtol=1e-10, atol=0)
    good = [0, 1, 3]
    assert Status(int(solution.status[2])) is Status.NONFINITE
    assert torch.equal(solution.value[good], expected.value[good])


def test_gradient_by_the_implicit_mode():
    """Its products by forward mode work inside the autograd.Function, where PyTorch switches forward mode off."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    z, solution = fixed_point(
        lambda z, x: 3 * torch.sin(z) + x,
        x.detach() * 0 + 2,
        x,
        solver="newton_krylov",
        rtol=1e-12,
        return_solution=True,
    )
    assert solution.converged.all()
    z.sum().backward()
    assert torch.allclose(x.grad, 1 / (1 - 3 * torch.cos(z)), rtol=1e-4)


def test_pytrees_batch_dims_and_fixed_steps():
    bank = BANK["expansive"](torch.float64)
    one = solve(bank.f, bank.z0, NewtonKrylov(), batch_dims=0, rtol=1e-10, on_failure="raise")
    assert torch.allclose(one.value, bank.solution, rtol=1e-6)
    tree = solve(lambda z: {"z": bank.f(z["z"])}, {"z": bank.z0}, NewtonKrylov(), rtol=1e-10, on_failure="raise")
    assert torch.allclose(tree.value["z"], bank.solution, rtol=1e-6)
    fixed = solve(bank.f, bank.z0, NewtonKrylov(), rtol=None, atol=None, max_steps=7)
    assert torch.allclose(fixed.value, bank.solution, rtol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match="must be a linear solver such as .*got 3"):
        NewtonKrylov(linear_solver=3)
    with pytest.raises(ValueError, match=r"forcing=...\) must be in \(0, 1\) or None, got 1.0"):
        NewtonKrylov(forcing=1.0)
    assert NewtonKrylov(linear_solver=GMRES()) == NewtonKrylov(linear_solver=GMRES())


@pytest.mark.parametrize("solver", [NewtonKrylov(), Newton()], ids=["krylov", "dense"])
def test_threads_do_not_disturb_each_other(solver):
    """PyTorch's forward mode has one level for all threads."""
    starts = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)

    def solved(start):
        return solve(lambda z: 0.9 * torch.cos(z), start.expand(5, 2), solver, rtol=1e-10).value

    alone = [solved(start) for start in starts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                assert all(map(torch.equal, pool.map(solved, starts), alone))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("solver", ["newton_krylov", "newton", "auto"])
@settings(max_examples=12)
@given(
    rate=st.floats(0.05, 0.95),
    curvature=st.floats(-1.0, 1.0).filter(lambda x: abs(x) > 0.01),
    size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_a_start_where_the_residual_has_no_slope(solver, rate, curvature, size, seed):
    """A contraction near its fixed point 0; half way to the other one, which repels, ``I - J`` is zero."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q

    def f(z):
        along = z @ basis
        return (rate * along + curvature * along**2) @ basis.T

    other = (1 - rate) / curvature
    z0 = torch.full((1, size), other / 2, dtype=torch.float64) @ basis.T
    solution = solve(f, z0, solver, rtol=1e-6, max_steps=200, on_failure="ignore")
    assert solution.converged.all()
    along = solution.value @ basis
    assert torch.minimum(along.abs(), (along - other).abs()).max() <= 1e-5 * abs(other)
