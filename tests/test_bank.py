"""Every solver on every problem of the bank, in every dtype and form of the state: solved, or a status that is true."""

import functools

import pytest
import torch
from solver_rows import CALLS_VARY, SOLVERS

from solvers import Solution, Status, solve
from solvers.testing import BANK
from solvers.testing.problems import conv, imlp

SMALLER = {"imlp": functools.partial(imlp, rows=64), "conv": functools.partial(conv, batch=4)}
RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}

# The maps that contract well enough for every method, in bfloat16 too.
EASY = ["linear 0.5", "linear 0.9", "cos", "tanh", "imlp", "conv", "contractive 2x2", "H-equation"]

# Who does not solve a problem within 500 steps; all others must.
UNSOLVED = {
    "linear 0.99": {"picard", "picard damped", "anderson 1", "broyden damped 5"},
    "rotation": {"squarem"},
    "planes": {"picard", "picard damped", "anderson 1", "broyden damped 5", "squarem"},
    "cos, marginal": {"picard"},
    "mixed": {"picard"},
    "expansive": SOLVERS.keys()
    - {"anderson 10", "broyden", "broyden 10", "broyden bad", "broyden bad 10", "broyden line search"}
    - {"newton", "newton_krylov", "auto"},
    # The first step, of Picard's length, is ten times too long.
    "adjoint": SOLVERS.keys()
    - {"anderson 10", "anderson 5 damped", "broyden", "newton", "newton_krylov", "auto", "squarem"},
    # Transients of 1e25: whether a method comes back from them is a matter of rounding.
    "nonnormal": set(SOLVERS),
}


# Problems of more unknowns than a dense Jacobian is formed for.
TOO_LARGE = {("newton", "conv"), ("newton", "adjoint")}


def solvers_by(problems):
    cases = [(solver, problem) for solver in SOLVERS for problem in problems if (solver, problem) not in TOO_LARGE]
    return pytest.mark.parametrize(("solver", "problem"), cases)


@functools.cache
def bank_problem(name, dtype):
    return SMALLER.get(name, BANK[name])(dtype)


def solved(name, z0, f, rtol, *, max_steps=500, **options) -> Solution:
    return solve(f, z0, SOLVERS[name], rtol=rtol, atol=0, max_steps=max_steps, on_failure="ignore", **options)


def require_true(solution, value, f, rtol):
    """Whatever came out: the residual of a CONVERGED sample and of its value says so, and no failure is silent."""
    assert (solution.residual <= rtol)[solution.converged].all()
    assert torch.equal(solution.failed, ~solution.converged)
    assert value.isfinite().all()
    # f(z) of an iterate z whose residual is small has a small one itself, where f does not expand too much.
    image = f(value)
    residual = (image - value).norm(dim=1) / image.norm(dim=1)
    assert (residual <= 30 * rtol)[solution.converged.view(-1)].all()


@solvers_by(BANK)
def test_solves_the_bank(solver, problem):
    for dtype, rtol in RTOL.items():
        bank = bank_problem(problem, dtype)
        # Nobody comes back from these transients, and Newton-Krylov's steps are long.
        steps = 60 if problem == "nonnormal" else 500
        solution = solved(solver, bank.z0, bank.f, rtol, max_steps=steps)
        require_true(solution, solution.value, bank.f, rtol)
        if problem != "nonnormal":  # where values grow by 1e25, a small relative residual tells nothing
            assert (solution.converged | (solution.residual > rtol)).all()
        if solver not in UNSOLVED.get(problem, ()):
            assert solution.converged.all(), solution.summary()
            # At a contraction factor of at most 0.9 the error is within ten residuals or so, at 0.99 a hundred.
            error = (solution.value - bank.solution).norm(dim=1) / bank.solution.norm(dim=1)
            assert (error <= (20 if problem in EASY else 200) * rtol).all()
        # Steps to values that are not finite are taken back, which takes calls.
        if solver not in CALLS_VARY and solution.converged.all():
            assert solution.num_evals == int(solution.num_steps.max())
        assert solution.value.dtype == dtype


@pytest.mark.long
@solvers_by(["linear 0.9", "tanh", "contractive 2x2", "H-equation", "rotation", "mixed", "expansive"])
def test_the_form_of_the_state_does_not_matter(solver, problem):
    """As a pytree, and with two batch dimensions: bit for bit. A sample alone, without any: the same answer."""
    bank = bank_problem(problem, torch.float64)
    rtol = 1e-5
    short = {"max_steps": 30}
    reference = solved(solver, bank.z0, bank.f, rtol, **short)
    size = bank.z0.shape[1]
    sizes = [size - size // 3, size // 3]

    def split(z):
        first, second = z.split(sizes, dim=1)
        return {"x": first, "y": [second]}

    def join(tree):
        return torch.cat((tree["x"], *tree["y"]), dim=1)

    tree = solved(solver, split(bank.z0), lambda tree: split(bank.f(join(tree))), rtol, **short)
    assert torch.equal(tree.num_steps, reference.num_steps)
    assert torch.equal(join(tree.value), reference.value)

    grid = (2, -1) if len(bank.z0) % 2 == 0 else (1, -1)
    folded = solved(
        solver,
        bank.z0.view(*grid, size),
        lambda z: bank.f(z.reshape(-1, size)).view(*grid, size),
        rtol,
        batch_dims=2,
        **short,
    )
    assert folded.status.shape == folded.value.shape[:2]
    assert torch.equal(folded.num_steps.view(-1), reference.num_steps)
    assert torch.equal(folded.value.reshape(-1, size), reference.value)

    def first_row(z):
        return bank.f(torch.cat((z.unsqueeze(0), bank.z0[1:])))[0]

    alone = solved(solver, bank.z0[0], first_row, rtol, batch_dims=0, **short)
    assert alone.status.shape == ()
    if reference.converged[0] and problem != "nonnormal":
        assert (alone.value - bank.solution[0]).norm() <= 200 * rtol * bank.solution[0].norm()


@solvers_by(EASY)
def test_solves_the_easy_ones_in_bfloat16(solver, problem):
    bank = bank_problem(problem, torch.float32)
    eps = torch.finfo(torch.bfloat16).eps

    def f(z):
        assert z.dtype == torch.bfloat16
        return bank.f(z.float()).bfloat16()

    solution = solved(solver, bank.z0.bfloat16(), f, 2 * eps)
    assert solution.converged.all(), solution.summary()
    error = (solution.value.float() - bank.solution).norm(dim=1) / bank.solution.norm(dim=1)
    assert (error <= 40 * eps).all()


def test_the_table_names_what_there_is():
    assert UNSOLVED.keys() <= BANK.keys()
    assert set(EASY) <= BANK.keys()
    assert all(names <= SOLVERS.keys() for names in UNSOLVED.values())
    assert Status.CONVERGED == 0
