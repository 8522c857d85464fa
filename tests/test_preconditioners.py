"""A preconditioner is called with something like the state, wherever its linear solver is used."""

import pytest
import torch

from implicit import SHINE, Implicit, fixed_point
from solvers import NewtonKrylov, solve
from solvers.linear import GMRES, AutoLinear, Richardson, linear_solve

pytestmark = pytest.mark.usefixtures("double")

SHAPES = {"a": (2, 3, 2), "b": (2,)}


@pytest.fixture
def called():
    """The shapes with which the preconditioner was called."""
    return set()


@pytest.fixture
def gmres(called):
    def preconditioner(r):
        called.add(tuple((name, tuple(r[name].shape)) for name in sorted(r)))
        return {name: 2 * r[name] for name in r}

    return GMRES(preconditioner=preconditioner)


# How a linear solver may hold another one.
HOLDERS = {
    "itself": lambda gmres: gmres,
    "richardson": lambda gmres: Richardson(otherwise=gmres, max_rate=0.0),
    "auto": lambda gmres: AutoLinear(max_unknowns=1, otherwise=gmres),
    "both": lambda gmres: AutoLinear(max_unknowns=1, otherwise=Richardson(otherwise=gmres, max_rate=0.0)),
}


def cell(z, x):
    return {
        "a": 0.5 * torch.tanh(z["a"] + z["b"].view(2, 1, 1)) + x["a"],
        "b": 0.5 * z["a"].mean((1, 2)).sin() + x["b"],
    }


def tensors():
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_in_linear_solves(gmres, called, holder):
    solution = linear_solve(lambda x: {name: 0.5 * x[name] for name in x}, tensors(), holder(gmres))
    assert solution.converged.all()
    assert called == {tuple(SHAPES.items())}


@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "torch.func"])
@pytest.mark.parametrize("holder", [*HOLDERS.values(), lambda gmres: None], ids=[*HOLDERS, "shine"])
def test_in_derivatives(gmres, called, holder, transformed):
    linear_solver = holder(gmres)
    if linear_solver is None:
        backward = SHINE(fallback=GMRES(preconditioner=gmres.preconditioner, rtol=1e-10), max_residual=0.0)
    else:
        backward = Implicit(linear_solver=linear_solver)

    def total(x, backward=backward):
        z = fixed_point(cell, zero, x, solver="broyden", backward=backward, rtol=1e-10)
        return z["a"].sum() + z["b"].sum()

    zero, x = {name: torch.zeros(shape) for name, shape in SHAPES.items()}, tensors()
    if transformed:
        found = torch.func.grad(total)(x)
    else:
        leaves = {name: leaf.requires_grad_() for name, leaf in x.items()}
        found = dict(zip(x, torch.autograd.grad(total(leaves), list(leaves.values())), strict=True))
    exact = torch.func.grad(lambda x: total(x, "implicit"))({name: leaf.detach() for name, leaf in x.items()})
    for name in SHAPES:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-7, atol=1e-9)
    assert called == {tuple(SHAPES.items())}


def test_in_newton_krylov(gmres, called):
    x = tensors()
    solution = solve(lambda z: cell(z, x), x, NewtonKrylov(linear_solver=gmres), rtol=1e-10)
    assert solution.converged.all()
    assert called == {tuple(SHAPES.items())}
