"""What a solve for a root says of starts, functions and options that are not as they should be."""

import re

import pytest
import torch

from implicit import (
    FixedPointLayer,
    Implicit,
    InvertibleResidual,
    Phantom,
    differentiable,
    fixed_point,
    root,
    stationary,
)
from implicit.optima import project_simplex, projected_gradient, proximal_gradient
from solvers import Anderson, Broyden, ConvergenceError, ConvergenceWarning, Newton, Picard, solve, solve_root
from solvers.linear import CG, GMRES, NeumannSeries

pytestmark = pytest.mark.usefixtures("double")


def test_bad_samples_leave_the_others_alone():
    x = torch.tensor([[4.0], [torch.nan], [9.0], [-1.0]])
    value, solution = root(lambda z, x: z**2 - x, torch.ones(4, 1), x, on_failure="ignore", return_solution=True)
    assert solution.statuses()[0] == solution.statuses()[2] == "CONVERGED"
    assert solution.statuses()[1] == "NONFINITE"
    assert solution.statuses()[3] not in ("CONVERGED", "NONFINITE")  # there is no root
    assert torch.allclose(value[::2], torch.tensor([[2.0], [3.0]]))


def test_a_start_that_is_a_root_and_a_root_at_zero():
    value, solution = root(lambda z: z**2 - 4, torch.full((1, 1), 2.0), return_solution=True)
    assert value.item() == 2.0
    assert solution.num_steps.item() == 1
    assert root(lambda z: z + z**3, torch.ones(1, 1), on_failure="raise").abs() < 1e-8
    assert root(lambda z: z - z, torch.ones(1, 1), on_failure="ignore").item() == 1.0


def test_singular_jacobian_says_so():
    with pytest.warns(ConvergenceWarning, match="(?s)root solve did not converge.*matrix is singular where 1 samples"):
        root(lambda z: torch.stack((z.sum(1), z.sum(1) + 1), dim=1), torch.ones(1, 2))
    x = torch.ones(1, 2, requires_grad=True)
    # A continuum of roots: the answer is one of them, and has no derivative.
    z = root(lambda z, x: torch.stack((z.sum(1) - x.sum(1),) * 2, dim=1), torch.ones(1, 2), x)
    with pytest.warns(ConvergenceWarning, match="(?s)linear solve of the derivative.*BREAKDOWN.*Jacobian of F"):
        z[:, 0].sum().backward()


def test_function_that_mixes_samples_says_so():
    def mixing(z, x):
        return z.roll(1) * 2 + z - x

    x = torch.ones(3, requires_grad=True)
    z = root(mixing, torch.full((3,), 1 / 3), x)
    with pytest.warns(ConvergenceWarning, match="(?s)derivative did not.*mixes samples.*batch_dims=0"):
        z[0].backward()
    z = root(mixing, torch.zeros(3), x, batch_dims=0)
    assert torch.allclose(z, x.detach() / 3)


def test_refusals():
    with pytest.raises(ValueError, match="F must return the shape of the state: got \\(2, 1\\)"):
        root(lambda z: z[:, :1], torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="F changed its argument z in place"):
        root(lambda z: z.sub_(1), torch.ones(2, 3), solver="broyden")
    with pytest.raises(ValueError, match="There is no solver 'newtn'"):
        root(torch.cos, torch.ones(1, 1), solver="newtn")
    with pytest.raises(ConvergenceError, match="The root solve did not converge"):
        root(lambda z: z**2 + 1, torch.ones(1, 1), on_failure="raise")


@pytest.mark.parametrize(
    ("face", "option", "ours"),
    [
        (lambda **options: fixed_point(torch.cos, torch.ones(1), **options), "tol", "rtol=... for a relative"),
        (lambda **options: fixed_point(torch.cos, torch.ones(1), **options), "b_solver", "backward=Implicit"),
        (lambda **options: solve(torch.cos, torch.ones(1), **options), "maxiter", "max_steps=... here"),
        (lambda **options: solve(torch.cos, torch.ones(1), **options), "m", "solver=Anderson"),
        (lambda **options: solve(torch.cos, torch.ones(1), **options), "slover", "Did you mean 'solver'"),
        (lambda **options: root(torch.cos, torch.ones(1), **options), "f_solver", 'It is solver="anderson" here'),
        (Anderson, "m", "memory=... here"),
        (Anderson, "beta", "damping=... here"),
        (GMRES, "maxiter", "max_steps=... here"),
        *[
            (face, "linear_solver", "It is backward=Implicit(linear_solver=...) here")
            for face in (
                lambda **options: root(torch.cos, torch.ones(1), **options),
                lambda **options: fixed_point(torch.cos, torch.ones(1), **options),
                lambda **options: FixedPointLayer(torch.cos, **options),
            )
        ],
        (Implicit, "tol", "It is linear_solver=GMRES(rtol=...) here"),
        (Implicit, "rtol", "It is linear_solver=GMRES(rtol=...) here"),
        (Implicit, "maxiter", "It is linear_solver=GMRES(max_steps=...) here"),
        (Implicit, "max_steps", "It is linear_solver=GMRES(max_steps=...) here"),
        *[
            (solver, option, f"It is {ours}=...")
            for solver in (Anderson, Broyden, Newton, Picard)
            for option, ours in (
                ("maxiter", "max_steps"),
                ("max_steps", "max_steps"),
                ("tol", "rtol"),
                ("rtol", "rtol"),
                ("atol", "atol"),
            )
        ],
        (Phantom, "maxiter", "It is steps=... here"),
        (NeumannSeries, "maxiter", "It is terms=... here"),
        (CG, "M", "It is preconditioner=... here"),
        (differentiable, "argnums", "Leave it out: derivatives to all tensor arguments are right"),
        (differentiable, "has_aux", "Leave it out: return only what the condition determines"),
    ],
)
def test_names_of_other_libraries(face, option, ours):
    with pytest.raises(TypeError, match=re.escape(ours)):
        face(**{option: 1})


def test_conditions_are_given_by_name():
    with pytest.raises(
        TypeError, match=r"takes keyword arguments only, got <function .*optimality=F for F\(z, \*args\)"
    ):
        differentiable(lambda z, x: z - x)


@pytest.mark.parametrize("start", [3.3, 0.5, -20.0])
@pytest.mark.parametrize("function", [lambda z: z**2 + 1, torch.cosh, lambda z: z**4 + z**2 + 1])
def test_newton_where_there_is_no_root(function, start):
    """50 steps without a smaller residual are stagnation, and 50 are the most by default."""
    for options, expected in (({}, ["MAX_STEPS"]), ({"max_steps": 150}, ["MAX_STEPS", "STAGNATED"])):
        solution = root(function, torch.tensor([[start]]), on_failure="ignore", return_solution=True, **options)[1]
        assert solution.statuses()[0] in expected


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda f: solve(f, torch.ones(1, 1)), "The solver"),
        (lambda f: solve_root(f, torch.ones(1, 1)), "The solver"),
        (lambda f: root(f, torch.ones(1, 1)), "root(F)"),
        (lambda f: fixed_point(f, torch.ones(1, 1)), "fixed_point(f)"),
        (FixedPointLayer, "FixedPointLayer(f)"),
        (InvertibleResidual, "InvertibleResidual(g)"),
        (stationary, "stationary(objective)"),
        (lambda f: projected_gradient(f, project_simplex), "projected_gradient(objective)"),
        (lambda f: projected_gradient(torch.sum, f), "projected_gradient(projection)"),
        (lambda f: proximal_gradient(torch.sum, f), "proximal_gradient(prox)"),
    ],
)
def test_what_cannot_be_called(call, name):
    with pytest.raises(TypeError, match=re.escape(f"{name} must be given a callable, got 3. Pass a function")):
        call(3)
    with pytest.raises(TypeError, match=re.escape(f"{name} must be given a map, got the class Tanh. Make an object")):
        call(torch.nn.Tanh)


@pytest.mark.parametrize("solver", ["newton", "newton_krylov", "anderson", "broyden"])
def test_tolerances_of_leaves(solver):
    x, z0 = torch.linspace(1, 2, 15).view(5, 3), {"a": torch.ones(5, 3), "b": torch.ones(5, 2)}
    rtol = {"a": 1e-6, "b": 1e-3}
    z, solution = root(
        lambda z, x: {"a": z["a"] ** 3 - x, "b": z["b"].cos() - z["b"]}, z0, x, solver=solver, rtol=rtol, atol=0,
        max_steps=100, return_solution=True,
    )  # fmt: skip
    assert solution.converged.all()
    assert torch.allclose(z["a"], x ** (1 / 3), rtol=1e-5)
    assert torch.allclose(z["b"], torch.full_like(z["b"], 0.739085), rtol=1e-2)
