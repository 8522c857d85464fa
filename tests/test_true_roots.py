"""What is said to be a root is one: the classical systems, far starts, and equations and unknowns in odd units."""

import pytest
import torch

from implicit import root
from solvers import Anderson, Auto, Broyden, Newton, NewtonKrylov
from solvers.testing import NONLINEAR

pytestmark = pytest.mark.usefixtures("double")

SOLVERS = {
    "newton": Newton(),
    "newton_krylov": NewtonKrylov(),
    "anderson": Anderson(memory=10),
    "broyden": Broyden(),
    "broyden with a line search": Broyden(line_search=True),
    "auto": Auto(),
}
RTOL = 1e-8
FACTORS = torch.tensor([[1.0], [10.0], [100.0]])


def distances(problem, x, columns):
    """(B,) length of Newton's step at ``x`` (B, D), times ``columns`` (D,)."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: problem.F(x.unsqueeze(0)).squeeze(0)))(x)
    # The shortest step that solves the equations, where they depend on each other.
    step = (torch.linalg.pinv(jacobian / columns) @ problem.F(x).unsqueeze(2)).squeeze(2)
    return step.norm(dim=1)


def assert_true(problem, solver, rows, columns, max_steps):
    z0 = columns * FACTORS * problem.x0
    z, solution = root(
        lambda z: rows * problem.F(z / columns), z0, solver=solver, rtol=RTOL, max_steps=max_steps,
        on_failure="ignore", return_solution=True,
    )  # fmt: skip
    if not solution.converged.any():
        return
    z, z0 = z[solution.converged], z0[solution.converged]
    # A root at zero has no relative error: its size is that of the start.
    bound = 10 * RTOL * (z.norm(dim=1) + 1.5e-8 * z0.norm(dim=1))
    assert (distances(problem, z / columns, columns) <= bound).all()


@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("solver", SOLVERS)
def test_claimed_roots_are_roots(solver, name):
    """From the usual start, and ten and a hundred times that."""
    problem = NONLINEAR[name]
    ones = torch.ones(problem.x0.shape[1])
    assert_true(problem, SOLVERS[solver], ones, ones, max_steps=100)


@pytest.mark.long
@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("solver", ["newton", "newton_krylov", "anderson", "broyden"])
def test_in_any_units_of_equations_and_unknowns(solver, name):
    """Between a millionth and a million."""
    problem = NONLINEAR[name]
    size = problem.x0.shape[1]
    generator = torch.Generator().manual_seed(len(name))
    for _ in range(2):
        rows, columns = 10.0 ** torch.randint(-6, 7, (2, size), generator=generator).double()
        assert_true(problem, SOLVERS[solver], rows, columns, max_steps=40)


@pytest.mark.parametrize(("name", "factor"), [("Powell badly scaled", 1.0), ("Brown almost linear", 100.0)])
def test_newton_krylov_goes_on_where_the_scaled_residual_is_small(name, factor):
    """It used to end there, far from the root."""
    problem = NONLINEAR[name]
    z, solution = root(
        problem.F, factor * problem.x0, solver="newton_krylov", rtol=RTOL, max_steps=300, return_solution=True
    )
    assert solution.converged.all()
    assert problem.F(z).norm() <= 1e-7


# Systems without a root, whose matrix is singular where the residual is smallest; it is 1e-4 of the unknowns there.
WITHOUT_ROOT = {
    "inconsistent": (2, lambda z: torch.stack([z.sum(1) - 1000, z.sum(1) - 1000.2], 1)),
    "relu": (1, lambda z: torch.relu(z + 5000) + 1),
    "clamp": (1, lambda z: z.clamp(-1000, 1000) - 1000.2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITHOUT_ROOT)
def test_a_singular_matrix_is_no_sign_of_a_root(name, dtype):
    size, f = WITHOUT_ROOT[name]
    _, solution = root(f, torch.zeros(2, size, dtype=dtype), rtol=1e-3, on_failure="ignore", return_solution=True)
    assert not solution.converged.any()


def test_a_continuum_of_roots_is_found():
    z, solution = root(lambda z: torch.stack([z.sum(1) - 2, z.sum(1) - 2], 1), torch.zeros(3, 2), return_solution=True)
    assert solution.converged.all()
    torch.testing.assert_close(z.sum(1), torch.full((3,), 2.0))
