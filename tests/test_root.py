"""Roots of functions: answers, derivatives, units, statuses and refusals."""

import gc
import math
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from implicit import Implicit, fixed_point, root
from solvers import Anderson, Broyden, Newton, NewtonKrylov, Status, solve
from solvers.linear import GMRES, Dense
from solvers.testing import NONLINEAR

pytestmark = pytest.mark.usefixtures("double")

SOLVERS = {"newton": Newton(), "newton_krylov": NewtonKrylov(), "broyden": Broyden(), "anderson": Anderson(memory=10)}


def cubic(z, x):
    """Two coupled equations with a regular root near (1, 1) for x near (2, 2)."""
    first, second = z.unbind(-1)
    return torch.stack((first + second**3 - x[..., 0], first**3 - second + x[..., 1] - 2), dim=-1)


def bratu(z, strength):
    """u'' + strength exp(u) = 0 on a grid, with u = 0 at both ends."""
    step = 1 / (z.shape[-1] + 1)
    padded = torch.nn.functional.pad(z, (1, 1))
    return (padded[..., 2:] - 2 * z + padded[..., :-2]) / step**2 + strength.unsqueeze(-1) * z.exp()


def heat_step(z, before, diffusivity):
    """An implicit Euler step of u_t = (k (1 + u^2) u_x)_x with insulated ends."""
    flux = diffusivity * (1 + ((z[..., 1:] + z[..., :-1]) / 2) ** 2) * z.diff(dim=-1)
    inflow = torch.nn.functional.pad(flux, (0, 1)) - torch.nn.functional.pad(flux, (1, 0))
    return z - before - 0.1 * inflow


def rosenbrock(z, x):
    return torch.stack((10 * (z[..., 1] - z[..., 0] ** 2), x[..., 0] - z[..., 0]), dim=-1)


def trees(z, x):
    return {"a": z["a"] ** 2 + z["b"].sum(-1) - x, "b": z["b"] - z["a"].unsqueeze(-1) / 4}


PROBLEMS = {
    "cubic": (cubic, torch.ones(3, 2).double(), (torch.tensor([[2.0, 2.1], [2.2, 1.9], [1.9, 2.0]]).double(),)),
    "bratu": (bratu, torch.zeros(2, 9).double(), (torch.tensor([1.0, 2.0]).double(),)),
    "heat": (heat_step, torch.ones(2, 8).double(), (torch.rand(2, 8).double(), torch.tensor(0.7).double())),
    "rosenbrock": (rosenbrock, torch.tensor([[-1.2, 1.0]]).double(), (torch.tensor([[1.0]]).double(),)),
    "cube root": (lambda z, x: z**3 - x, torch.ones(4).double(), (torch.tensor([0.5, 1.0, 2.0, 9.0]).double(),)),
    "sign": (lambda z, x: x - z - z**3, torch.zeros(2, 1).double(), (torch.tensor([[0.5], [3.0]]).double(),)),
}


CYCLES = {("cubic", "broyden"), ("rosenbrock", "broyden")}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_roots_and_their_derivatives(problem, solver):
    """With the default tolerances the root is right to 1e-6, and its derivative that of finite differences."""
    if (problem, solver) in CYCLES:
        pytest.skip("Broyden's method without a line search cycles there")
    function, z0, args = PROBLEMS[problem]
    args = tuple(arg.clone().requires_grad_() for arg in args)

    def answer(*args):
        return root(function, z0, *args, solver=SOLVERS[solver], max_steps=300, on_failure="raise")

    value, solution = root(
        function, z0, *args, solver=SOLVERS[solver], max_steps=300, on_failure="raise", return_solution=True
    )
    assert solution.converged.all()
    residual = function(value.detach(), *args)
    assert torch.allclose(solution.change, residual.reshape(len(z0), -1).square().mean(1).sqrt(), atol=1e-15)
    exact = root(function, z0, *args, rtol=1e-14, max_steps=100, on_failure="ignore")
    assert torch.allclose(value, exact, rtol=1e-6, atol=1e-9)
    w = torch.randn_like(value)
    gradients = torch.autograd.grad((answer(*args) * w).sum(), args)
    for arg, gradient in zip(args, gradients, strict=True):
        direction = torch.randn_like(arg)
        difference = 0.0
        for sign in (1, -1):
            moved = tuple(a.detach() + sign * 1e-5 * direction if a is arg else a.detach() for a in args)
            difference += sign * (root(function, z0, *moved, rtol=1e-14, on_failure="ignore") * w).sum() / 2e-5
        assert torch.allclose((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-7)


def test_every_order_and_mode():
    function, _, (x,) = PROBLEMS["cubic"]
    x.requires_grad_()

    def answer(x):
        return root(function, torch.ones_like(x), x, rtol=1e-12)

    assert torch.autograd.gradcheck(answer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(answer, x)
    one = x[0].detach()

    def of_one(x):
        return root(function, torch.ones_like(x), x, rtol=1e-12, batch_dims=0)

    reverse, forward = torch.func.jacrev(of_one)(one), torch.func.jacfwd(of_one)(one)
    assert torch.allclose(reverse, forward, rtol=1e-12)
    assert torch.allclose(torch.func.vmap(torch.func.jacrev(of_one))(x.detach())[0], reverse, rtol=1e-12)
    hessians = torch.func.vmap(torch.func.hessian(lambda x: of_one(x).sum()))(x.detach())
    assert torch.allclose(hessians[0], torch.func.hessian(lambda x: of_one(x).sum())(one))


@pytest.mark.parametrize(
    "backward", ["implicit", "unrolled", "checkpointed", "phantom", "jfb", "neumann", "shine", "auto"]
)
@pytest.mark.parametrize("scale", [1.0, -1e6])
def test_backward_modes(backward, scale):
    """With one unknown per sample every mode is exact, in any units of F."""
    x = torch.tensor([[2.0], [3.0]], requires_grad=True)
    solver = Broyden() if backward in ("unrolled", "checkpointed", "shine") else Newton()
    mode = "shine" if backward == "shine" else backward
    z, solution = root(
        lambda z, x: scale * (z**3 - x), torch.ones(2, 1), x, solver=solver, backward=mode, rtol=1e-10,
        return_solution=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(z.sum(), x)
    # SHINE is as good as Broyden's estimate of the inverse, which it tells.
    tolerance = 0.5 if backward == "shine" else 1e-6
    assert torch.allclose(gradient, 1 / (3 * z**2), rtol=tolerance)
    if backward == "shine":
        assert (solution.adjoint.residual <= 0.5).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", ["bratu", "heat", "cube root"])
def test_units_change_nothing(solver, problem):
    """Neither those of F nor those of z change a status or the number of steps."""
    function, z0, args = PROBLEMS[problem]
    results, reference = [], z0
    for of_f, of_z in ((1.0, 1.0), (2.0**30, 1.0), (-(2.0**-30), 1.0), (1.0, 2.0**30), (1.0, 2.0**-30)):

        def scaled(z, *args, of_f=of_f, of_z=of_z):
            return of_f * function(z / of_z, *args)

        value, solution = root(
            scaled, of_z * z0, *args, solver=SOLVERS[solver], max_steps=300, return_solution=True, rtol=1e-6
        )
        results.append((solution.status.tolist(), solution.num_steps.tolist()))
        reference = value if of_z == 1.0 == of_f else reference
        assert torch.allclose(value / of_z, reference, rtol=1e-5)
    assert all(result == results[0] for result in results)


@pytest.mark.long
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(-8, 8), st.sampled_from(["newton", "newton_krylov"]))
def test_random_systems_in_random_units(seed, size, exponent, solver):
    """The same seed in other units gives the same statuses and steps, and what is CONVERGED is a root."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, size, size, generator=generator)
    b = torch.randn(3, size, generator=generator)

    def function(z, factor):
        return factor * (torch.tanh((a @ z.unsqueeze(2)).squeeze(2)) + 0.5 * z - b)

    found = [
        root(function, torch.ones(3, size), c, solver=solver, on_failure="ignore", return_solution=True)
        for c in (1.0, 2.0 ** round(3 * exponent))
    ]
    (value, solution), (other, scaled) = found
    assert torch.equal(solution.status, scaled.status)
    assert torch.equal(solution.num_steps, scaled.num_steps)
    assert torch.equal(value, other)
    ok = solution.converged
    assert (function(value, 1.0)[ok].abs() < 1e-5 * (1 + value[ok].abs())).all()


def test_absolute_tolerance_is_in_the_units_of_the_function():
    for solver in ("broyden", "anderson", "newton", "newton_krylov"):
        value = root(lambda z: 1e6 * (z**2 - 2), torch.ones(1, 1), solver=solver, rtol=0, atol=1e-2)
        assert (1e6 * (value**2 - 2)).abs() <= 1e-2


def test_newton_takes_the_steps_of_newton():
    """Full steps, one call with the Jacobian for each, and the value is the iterate after the last one."""
    z, steps = torch.tensor([[2.0]]), 0
    while True:
        step = -(z**2 - 2) / (2 * z)
        z, steps = z + step, steps + 1
        if step.abs() <= 1e-6 * z.abs():
            break
    value, solution = root(lambda z: z**2 - 2, torch.tensor([[2.0]]), rtol=1e-6, return_solution=True)
    assert torch.equal(value, z)
    assert solution.num_steps.item() == steps
    assert solution.num_evals == steps + 2  # one at the start without a Jacobian, one for the residual of the value


@pytest.mark.parametrize("name", ["Generalized Rosenbrock", "Powell badly scaled", "Chebyquad", "Broyden banded"])
def test_classical_systems(name):
    problem = NONLINEAR[name]
    for factor in (1, 1e8, -1e-8):
        value = root(lambda z, c=factor: c * problem.F(z), problem.x0, max_steps=200, on_failure="raise")
        assert problem.F(value).norm() < 1e-6


def test_newton_solves_fixed_points_too():
    solution = solve(lambda z: 3 * torch.cos(z), torch.ones(2, 3), "newton", rtol=1e-12)
    assert torch.allclose(solution.value, 3 * torch.cos(solution.value))
    assert solution.num_steps.max() <= 8
    with pytest.raises(ValueError, match="a sample has 600 unknowns. Use NewtonKrylov"):
        solve(torch.cos, torch.ones(1, 600), "newton")


def test_functions_without_forward_mode():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    value = root(lambda z: Cube.apply(z) - 2, torch.ones(2, 2), on_failure="raise")
    assert torch.allclose(value, torch.full((2, 2), 2 ** (1 / 3)))


def test_pytrees_and_one_problem():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    start = {"a": torch.ones(2), "b": torch.ones(2, 3)}
    value = root(trees, start, x, on_failure="raise")
    # a^2 + 3 a / 4 = x
    expected = (-0.75 + (0.75**2 + 4 * x) ** 0.5) / 2
    assert torch.allclose(value["a"], expected)
    gradients = [torch.autograd.grad(a.sum(), x)[0] for a in (value["a"], expected)]
    assert torch.allclose(*gradients, rtol=1e-8)
    y = torch.tensor([2.0, 2.1], requires_grad=True)
    one = root(cubic, torch.ones(2), y, batch_dims=0)
    assert torch.allclose(one, root(cubic, torch.ones(1, 2), y.unsqueeze(0))[0])


def test_linear_solver_is_chosen_by_size_and_named():
    for size, name in ((3, "Dense"), (40, "Richardson")):
        x = torch.ones(2, size, requires_grad=True)
        z, solution = root(lambda z, x: z + 0.1 * z**3 - x, torch.ones(2, size), x, return_solution=True)
        z.sum().backward()
        assert type(solution.adjoint.solver).__name__ == name
        assert f"solver={name}(" in repr(solution.adjoint)
        assert torch.allclose(x.grad, 1 / (1 + 0.3 * z**2), rtol=1e-6)


def test_preconditioner_of_a_derivative():
    x = torch.ones(2, 50, requires_grad=True)
    scale = torch.logspace(0, 2, 50)
    calls = []

    def precondition(v):
        calls.append(v.shape)
        return v / scale

    results = []
    for linear_solver in (GMRES(max_steps=500, restart=50), GMRES(preconditioner=precondition)):
        z, solution = root(
            lambda z, x: scale * (z - x), torch.zeros(2, 50), x, solver="newton_krylov",
            backward=Implicit(linear_solver=linear_solver), return_solution=True,
        )  # fmt: skip
        results.append((torch.autograd.grad(z.sum(), x)[0], solution.adjoint.num_steps.max().item()))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert results[1][1] == 1 < results[0][1]
    assert calls[0] == (2, 50)


def test_compact_takes_finished_samples_out():
    x = torch.linspace(1, 100, 8).unsqueeze(1)
    sizes = []

    def function(z, x):
        sizes.append(len(z))
        return z**2 - x

    value, solution = root(function, torch.ones(8, 1), x, solver="broyden", compact=True, return_solution=True)
    assert min(sizes[:-1]) < 8
    assert torch.allclose(value, x.sqrt(), rtol=1e-6)
    assert torch.allclose(solution.change, (value**2 - x).abs().squeeze(1))


def test_threads_do_not_disturb_each_other():
    results = {}

    def work(k):
        x = torch.full((5, 2), 2.0 + 0.01 * k, dtype=torch.float64, requires_grad=True)
        z = root(cubic, torch.ones(5, 2, dtype=torch.float64), x)
        z.sum().backward()
        results[k] = (z.detach(), x.grad)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    together = dict(results)
    for k in range(8):
        work(k)
        assert all(torch.equal(a, b) for a, b in zip(together[k], results[k], strict=True))


def test_forward_mode_in_one_thread_is_not_seen_in_another():
    """Newton's method differentiates in forward mode, whose level PyTorch keeps for all threads at once."""
    inside, done = threading.Event(), threading.Event()

    def waiting(z):
        if forward_ad._current_level >= 0 and not done.is_set():
            inside.set()
            assert done.wait(60)
        return z**2 - 2

    thread = threading.Thread(target=lambda: root(waiting, torch.ones(3, 2)))
    thread.start()
    try:
        assert inside.wait(60)
        weight = torch.full((2,), 0.5, requires_grad=True)
        for backward in ("implicit", "checkpointed"):
            z = fixed_point(lambda z: torch.cos(weight * z), torch.zeros(3, 2), backward=backward, max_steps=50)
            weight.grad = None
            z.sum().backward()
            assert weight.grad.abs().min() > 0
    finally:
        done.set()
        thread.join()


def test_nothing_outlives_its_use():
    x = torch.full((2, 1), 3.0, requires_grad=True)
    inner = x * 2
    seen = weakref.ref(inner)
    z = root(lambda z, x: z**2 - x, torch.ones(2, 1), inner)
    z.sum().backward()
    del inner
    gc.collect()
    assert seen() is None


def test_kepler():
    """The anomalies of the inverse are those of the equation, with both derivatives in closed form."""
    mean = torch.linspace(0, 2 * math.pi, 1001).requires_grad_()
    eccentricity = torch.linspace(0, 0.95, 1001).requires_grad_()

    def kepler(anomaly, eccentricity, mean):
        return anomaly - eccentricity * torch.sin(anomaly) - mean

    anomaly = root(kepler, mean + 0.85 * eccentricity, eccentricity, mean, max_steps=100)
    slope = 1 - eccentricity * anomaly.cos()
    gradients = torch.autograd.grad(anomaly.sum(), (mean, eccentricity))
    assert torch.allclose(kepler(anomaly, eccentricity, mean), torch.zeros(1001), atol=1e-12)
    assert torch.allclose(gradients[0], 1 / slope, rtol=1e-8)
    assert torch.allclose(gradients[1], anomaly.sin() / slope, rtol=1e-8)


def test_dense_is_exact_where_the_status_says_so():
    assert Status(int(solve(lambda z: z / 2, torch.ones(1, 1), "newton").status)) is Status.CONVERGED
    assert Implicit(linear_solver="dense").linear_solver == Dense()
    with pytest.raises(ValueError, match="There is no linear solver 'lu'"):
        Implicit(linear_solver="lu")
